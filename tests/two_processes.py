"""Scripts that run as two processes of four devices each, which together form a mesh of eight."""

import os
import pathlib
import socket
import subprocess
import sys


def run(script: pathlib.Path, *arguments: str) -> list[str]:
  """Runs a script, which begins with `join`, as both processes, and returns what each printed; none may fail."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  search = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  environment = {**os.environ, "PYTHONPATH": search, "XLA_FLAGS": flags}
  processes = [
    subprocess.Popen(
      [sys.executable, script, str(port), str(i), *arguments],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]
  outputs = [p.communicate(timeout=300)[0].decode() for p in processes]
  assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
  return outputs


def join() -> list[str]:
  """Makes this process one of the two that `run` started; returns the script's own arguments."""
  import jax

  port, process, *arguments = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
  assert len(jax.devices()) == 8
  assert len(jax.local_devices()) == 4
  return arguments
