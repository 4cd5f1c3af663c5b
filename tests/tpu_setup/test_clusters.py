"""gke.sh and slurm.sbatch: what they hand to Kubernetes and SLURM, and what becomes of exit codes."""

import pathlib
import shutil

import pytest
import yaml

from tests.fixtures.pod_scripts import ROOT, Machine

GKE = ("tpu_setup/gke.sh",)
POD = ("--pod", "tpu_setup/pod.env.example")


def test_the_jobset_has_a_pod_for_every_host_and_fails_only_where_it_would_again(tmp_path: pathlib.Path) -> None:
  override = "--config.exclude_tasks=('a\\b', \"c\")"
  out = Machine(tmp_path).run(*GKE, "render", *POD, "--slices", "3", "--restarts", "7", "--", override)
  assert out.returncode == 0, out.stderr
  jobset = yaml.safe_load(out.stdout)
  assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "supermoe")
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7
  assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
  (slices,) = jobset["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert (slices["replicas"], job["completions"], job["parallelism"], job["backoffLimit"]) == (3, 4, 4, 0)
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
  assert 75 not in rule["onExitCodes"]["values"] and {1, 2} <= set(rule["onExitCodes"]["values"])
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # without it Kubernetes refuses a podFailurePolicy
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,) = pod["containers"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert container["command"][:2] == ["supermoe", "train"] and container["command"][-1] == override
  assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}


@pytest.mark.parametrize("verb", ["launch", "resume"])
def test_what_is_rendered_is_what_kubectl_gets(verb: str, tmp_path: pathlib.Path) -> None:
  machine, got = Machine(tmp_path), tmp_path / "got.yaml"
  out = machine.run(*GKE, verb, *POD, STUB_kubectl=f'case "$*" in *create*) cat >{got} ;; esac')
  assert out.returncode == 0, out.stderr
  assert got.read_text() == machine.run(*GKE, "render", verb, *POD).stdout
  assert all(call[1:3] == ["--context", "gke_my-project_us-west4_my-cluster"] for call in machine.calls())


def test_a_resumed_pod_looks_for_the_run_that_was_begun(tmp_path: pathlib.Path) -> None:
  machine, workdir = Machine(tmp_path, programs=("supermoe",)), tmp_path / "run"
  out = machine.run(*GKE, "render", "resume", *POD, "--workdir", str(workdir))
  (slices,) = yaml.safe_load(out.stdout)["spec"]["replicatedJobs"]
  (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
  out = machine.run(*container["command"])
  assert out.returncode == 2 and f"{workdir} holds no run that was begun" in out.stderr
  workdir.mkdir()
  (workdir / "config.json").touch()
  assert machine.run(*container["command"]).returncode == 0
  assert machine.calls() == [
    ["supermoe", "train", "--config", "experiments/complete_journey.py", "--workdir", str(workdir)]
  ]


@pytest.mark.parametrize(
  ("machine", "topology", "tpu", "hosts"),
  [
    ("ct5lp-hightpu-4t", "16x16", "tpu-v5-lite-podslice", 64),
    ("ct6e-standard-4t", "4x8", "tpu-v6e-slice", 8),
    ("ct6e-standard-8t", "2x4", "tpu-v6e-slice", 1),
    ("ct5p-hightpu-4t", "4x4x8", "tpu-v5p-slice", 32),
    ("ct4p-hightpu-4t", "2x2x2", "tpu-v4-podslice", 2),
  ],
)
def test_machine_and_topology_say_how_many_hosts(
  machine: str, topology: str, tpu: str, hosts: int, tmp_path: pathlib.Path
) -> None:
  out = Machine(tmp_path).run(*GKE, "render", *POD, "--machine", machine, "--topology", topology)
  (slices,) = yaml.safe_load(out.stdout)["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert job["completions"] == hosts
  assert tpu in job["template"]["spec"]["nodeSelector"].values()


@pytest.mark.parametrize("verb", ["create", "delete"])
def test_what_costs_money_needs_a_yes(verb: str, tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  out = machine.run(*GKE, verb, *POD, "--slices", "2", "--spot", "true")
  assert out.returncode == 2 and out.stdout == "" and machine.calls() == []
  assert "2 node pool(s) in my-cluster, my-project, us-west4-a: each 4 × ct5lp-hightpu-4t, together 32 chips, spot" in (
    out.stderr
  )
  assert "add --yes" in out.stderr


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (("launch", "--image", ""), "IMAGE is not set; give --image or a line IMAGE=…"),
    (("launch", "--claim", ""), "CLAIM is not set"),
    (("launch", "--image", "a b"), "--image a b"),
    (("launch", "--cluster", ""), "CLUSTER is not set"),
    (("create", "--location", ""), "LOCATION is not set"),
    (("create", "--machine", "n1-standard-8"), "--machine n1-standard-8 is not of the form"),
    (("create", "--topology", "3x3"), "--topology 3x3 has 9 chips, no multiple of the 4"),
    (("create", "--topology", "16"), "--topology 16 is not of the form"),
    (("launch", "--", "a\nb"), "holds a line break"),
    (("apply",), "unknown verb apply"),
  ],
)
def test_wrong_usage_is_told_with_code_2(arguments: tuple[str, ...], told: str, tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  out = machine.run(*GKE, arguments[0], *POD, *arguments[1:])
  assert out.returncode == 2 and told in out.stderr, out.stderr
  assert machine.calls() == []


def test_a_template_that_asks_for_more_is_refused(tmp_path: pathlib.Path) -> None:
  shutil.copytree(ROOT / "tpu_setup", tmp_path / "tpu_setup")
  with (tmp_path / "tpu_setup" / "jobset.yaml").open("a") as file:
    file.write("# @QUEUE@\n")
  machine = Machine(tmp_path)
  out = machine.run(*GKE, "launch", *POD, cwd=tmp_path)
  assert out.returncode == 1 and "jobset.yaml asks for QUEUE, which is not set" in out.stderr
  assert machine.calls() == []


def test_health_fails_where_a_slice_does_not_answer(tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  out = machine.run(*GKE, "health", *POD, "--slices", "2", STUB_kubectl='[[ "$*" != *slice-1* ]]')
  assert out.returncode == 1 and len(machine.calls()) == 4


def _slurm(folder: pathlib.Path, **variables: str) -> tuple[int, list[list[str]], str]:
  machine = Machine(folder)
  out = machine.run(
    *("bash", str(ROOT / "tpu_setup" / "slurm.sbatch"), "--config", "mine.py", "--workdir", str(folder / "run")),
    cwd=folder,
    SLURM_JOB_ID="17",
    SLURM_SUBMIT_DIR=str(ROOT),
    **variables,
  )
  return out.returncode, machine.calls(), out.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 70, 137])
def test_a_slurm_job_that_ends_otherwise_is_not_queued_again(code: int, tmp_path: pathlib.Path) -> None:
  ended, calls, _ = _slurm(tmp_path, STUB_srun=f"exit {code}")
  assert ended == code and [c[0] for c in calls] == ["srun"]
  assert (tmp_path / "run" / "logs").is_dir()


def test_a_slurm_job_that_saved_its_run_is_queued_again_but_not_for_ever(tmp_path: pathlib.Path) -> None:
  ended, calls, _ = _slurm(tmp_path, STUB_srun="exit 75", SLURM_RESTART_COUNT="99")
  assert ended == 75 and calls[-1] == ["scontrol", "requeue", "17"]
  ended, calls, told = _slurm(tmp_path / "more", STUB_srun="exit 75", SLURM_RESTART_COUNT="100")
  assert ended == 1 and [c[0] for c in calls] == ["srun"] and "queued again 100 times already" in told


def test_a_slurm_process_sees_all_gpus_of_its_node(tmp_path: pathlib.Path) -> None:
  program = tmp_path / "supermoe"
  program.write_text("#!/bin/sh\necho gpus $JAX_LOCAL_DEVICE_IDS\n")
  program.chmod(0o755)
  _, calls, _ = _slurm(tmp_path)
  command = calls[0][calls[0].index("bash") :]
  command[command.index(".venv/bin/supermoe")] = str(program)
  out = Machine(tmp_path).run(*command, SLURM_GPUS_ON_NODE="4")
  assert out.returncode == 0 and out.stdout == "gpus 0,1,2,3\n"


def test_slurm_is_told_by_comments_before_the_first_command() -> None:
  lines = (ROOT / "tpu_setup" / "slurm.sbatch").read_text().splitlines()
  told = [line for line in lines if line.startswith("#SBATCH ")]
  assert lines[1 : 1 + len(told)] == told
  for option in ("--ntasks-per-node=1", "--signal=TERM@120", "--requeue", "--open-mode=append"):
    assert f"#SBATCH {option}" in told


def test_a_slurm_job_is_told_where_it_does_not_belong(tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  script = str(ROOT / "tpu_setup" / "slurm.sbatch")
  out = machine.run("bash", script, "--config", "a", "--workdir", "/b")
  assert out.returncode == 2 and "this is no SLURM job; submit it" in out.stderr
  out = machine.run("bash", script, cwd=tmp_path)
  assert out.returncode == 2 and "is not the repository's root" in out.stderr
  out = machine.run("bash", script, "--config", "a", "--workdir", "b")
  assert out.returncode == 2 and "--workdir b" in out.stderr
