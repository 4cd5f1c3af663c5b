"""Do experts pay? Quality against the number of experts, at equal active parameters and equal steps.

    python experiments/expert_scaling.py simulated --out runs/expert_scaling/simulated.jsonl
    python experiments/expert_scaling.py complete_journey --out runs/expert_scaling/complete_journey.jsonl
    python experiments/expert_scaling.py movielens_1m:FOLDER --out runs/expert_scaling/movielens_1m.jsonl
    python experiments/expert_scaling.py --picture runs/expert_scaling/*.jsonl --out runs/expert_scaling/experts

Every token visits two experts of E, or the one expert of E = 1, which is twice as wide: so all models multiply a token
by equally many numbers, but for the router. Each run is a line of the file; the same command goes on after a stop.
Further arguments override the config.

The last command draws one picture, OUT.svg, and writes its numbers to OUT.md. A gain is in percent of what the single
expert has over an answer that ignores the user, on test, paired by seed; the picture shows the mean over the tasks that
one expert answers beyond chance. Below, each log's tokens: which experts the events of a user segment visit. Segments
are the first bits of the simulated users, and age groups in the real logs. No model reads the bits or the ages as
input, and the ages are no task here.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.evaluation.metrics import improvement
from supermoe_jax.seesaw.gains import beyond_constant, constant_score, estimate, relative_gain
from supermoe_jax.simulation.latent_users import SimulatedTask, Simulation
from supermoe_jax.simulation.simulator import simulate, simulation_config
from supermoe_jax.training.run import Run

EXPERTS = (1, 2, 4, 8, 16, 32, 64)
SEEDS = (0, 1, 2)
SHOWN_EXPERTS = 16  # the model whose tokens are shown
MOST_SHOWN = 600  # test snapshots whose tokens are counted
HERE = pathlib.Path(__file__).parent


def simulated() -> ml_collections.ConfigDict:
  """The config of simulated users with 4,096 segments: four groups of three bits, two tasks a group, the next item."""
  folder = "runs/expert_scaling/simulated"
  tasks = [SimulatedTask(f"{letter}_{i}", group) for group, letter in enumerate("abcd") for i in (1, 2)]
  simulate(Simulation(users=12_000, groups=(3, 3, 3, 3), items=96, events=(24, 40), tasks=tuple(tasks)), folder)
  model = {"d_model": 24, "layers": 2, "heads": 2, "d_hidden": 48, "d_expert": 24, "max_events": 40, "dropout": 0.0}
  train = {"steps": 600, "batch_rows": 64, "snapshots_per_row": 3, "learning_rate": 1e-2, "checkpoint_every": 600}
  train["weighting"] = {"method": "equal"}
  return ml_collections.ConfigDict({**simulation_config(folder), "model": model, "train": train})


# What each log changes in its shipped config, so that 21 runs take an hour, and the names of its user segments by SQL.
LOGS: dict[str, tuple[tuple[str, ...], str]] = {
  "simulated": (
    (),
    "SELECT \"user\", bits[1] || '' || bits[2] || bits[3] FROM 'runs/expert_scaling/simulated/truth.parquet'",
  ),
  "complete_journey": (
    (
      "--config.data.path=runs/expert_scaling/complete_journey",
      "--config.exclude_tasks=('demo_*',)",
      "--config.model.max_events=96",
      "--config.train.steps=300",
      "--config.train.checkpoint_every=300",
    ),
    "SELECT household_id, age FROM '{users}'",
  ),
  "movielens_1m": (
    (
      "--config.data.path=runs/expert_scaling/movielens_1m",
      "--config.exclude_tasks=('female', 'age_group', 'occupation')",
      "--config.train.steps=600",
      "--config.train.checkpoint_every=600",
    ),
    "SELECT user_id, age FROM '{users}'",
  ),
}


def load(log: str, overrides: Sequence[str]) -> config.Config:
  """Returns the config of a log such as "simulated" or "movielens_1m:FOLDER"."""
  name, colon, folder = log.partition(":")
  changed = [*LOGS[name][0], *overrides]
  if name == "simulated":
    return config.override(config.resolve(simulated().to_dict()), changed)
  return config.load(f"{HERE / name}.py{colon}{folder}", changed)


def with_experts(cfg: config.Config, experts: int, seed: int) -> config.Config:
  """Returns the config with a number of experts. A token visits two of them. A single expert is twice as wide."""
  one = experts == 1
  sizes = {"experts": experts, "experts_per_token": 1 if one else 2, "d_expert": cfg.model.d_expert * (2 if one else 1)}
  return config.override(cfg, [*(f"--config.model.{k}={v}" for k, v in sizes.items()), f"--config.train.seed={seed}"])


def run_once(log: str, overrides: Sequence[str], experts: int, seed: int, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates one run; returns its scores, those of constant answers, and what its experts did."""
  from supermoe_jax.data.preparation import prepare
  from supermoe_jax.evaluation import evaluate
  from supermoe_jax.seesaw import constant_scores
  from supermoe_jax.training import loop

  cfg = with_experts(load(log, overrides), experts, seed)
  if not (pathlib.Path(cfg.data.path) / "manifest.json").exists():
    prepare.prepare(cfg)
  workdir = folder / f"{experts}-{seed}"
  loop.train(cfg, workdir)
  run = Run(workdir)
  found = evaluate.evaluate(run, compare=False, progress=False, write=False)
  main, measured = found["main_metric"], found["splits"]["test"]
  batches = list(snapshot_batches.query_batches(run.dataset, cfg, split=TEST))
  popular = constant_scores.popularity_scores(cfg, batches)
  constant = {
    n: popular[n][main[n]] if n in popular else constant_score(main[n], t["metrics"]) for n, t in measured.items()
  }
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [line for line in lines if "dropped_share" in line]
  return {
    "log": log.partition(":")[0],
    "experts": experts,
    "seed": seed,
    "overrides": list(overrides),
    "metric": main,
    "test": {n: t["metrics"][main[n]] for n, t in measured.items()},
    "validation": {n: t["metrics"][main[n]] for n, t in found["splits"]["validation"].items()},
    "constant": constant,
    "parameters": int(sum(x.size for x in _leaves(run))),
    "dropped_share": float(np.mean([line["dropped_share"] for line in steps[len(steps) // 2 :]])),
    "segments": segments(run, log) if experts == SHOWN_EXPERTS and seed == SEEDS[0] else None,
  }


def _leaves(run: Run) -> list[Any]:
  import jax

  return jax.tree.leaves(run.variables)


def segments(run: Run, log: str) -> dict[str, list[float]]:
  """Returns for each user segment the share of its events' choices that each expert of the last MoE layer gets."""
  users = run.cfg.data.users
  query = LOGS[log.partition(":")[0]][1].format(users=users.files[0] if users else "")
  named = {str(user): str(segment) for user, segment in duckdb.sql(query).fetchall() if segment is not None}
  counts: dict[str, np.ndarray] = {}
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST, most=MOST_SHOWN):
    chosen, valid = run.event_experts(batch.features)[-1], np.asarray(batch.features.segment) > 0
    for row, question in enumerate(batch.questions):
      segment = named.get(question.user_id)
      if segment is not None:
        own = np.bincount(chosen[row][valid[row]].reshape(-1), minlength=run.cfg.model.experts)
        counts[segment] = counts.get(segment, 0) + own
  return {name: (n / n.sum()).round(5).tolist() for name, n in sorted(counts.items())}


# -------------------------------------------------------------------------------------------------------------- picture


def gains(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, list[float]]]:
  """Returns the gains over one expert of a log's runs, by the number of experts and task, a number a seed.

  Tasks that one expert does not answer beyond chance better than a constant are left out.
  """
  by = {(r["experts"], r["seed"]): r for r in rows}
  seeds = [s for s in SEEDS if (1, s) in by]
  out: dict[int, dict[str, list[float]]] = {}
  for task, metric in rows[0]["metric"].items():
    known = [s for s in seeds if by[1, s]["constant"][task] is not None]
    over = estimate(improvement(metric, by[1, s]["test"][task], by[1, s]["constant"][task]) for s in known)
    if not known or not beyond_constant(over):
      continue
    for experts in sorted({e for e, _ in by} - {1}):
      own = [(by[experts, s]["test"][task], by[1, s]["test"][task]) for s in seeds if (experts, s) in by]
      found = [relative_gain(metric, mine, one, over["mean"]) for mine, one in own]
      out.setdefault(experts, {})[task] = [g for g in found if g is not None]
  return out


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the numbers of a log in Markdown: mean gain over tasks with its interval, and every task's score."""
  found, tasks = gains(rows), list(rows[0]["metric"])
  head = ["experts", "parameters", "dropped", "mean gain", *(f"{t} ({rows[0]['metric'][t]})" for t in tasks)]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for experts in sorted({r["experts"] for r in rows}):
    own = [r for r in rows if r["experts"] == experts]
    mean = "0" if experts == 1 else _interval(_mean_gain(found[experts])) if experts in found else "–"
    scores = (f"{np.mean([r['test'][t] for r in own]):.4f}" for t in tasks)
    dropped = f"{100 * np.mean([r['dropped_share'] for r in own]):.1f} %"
    lines.append("| " + " | ".join([str(experts), f"{own[0]['parameters']:,}", dropped, mean, *scores]) + " |")
  return lines


def _mean_gain(of_tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Returns the mean over tasks of their gains, `{task: [seeds]}`, and its interval over seeds."""
  return estimate(np.mean(list(of_tasks.values()), axis=0))


def _interval(found: Mapping[str, Any]) -> str:
  text = f"{found['mean']:+.1f} %"
  return text if found["low"] is None else f"{text} ({found['low']:+.1f} to {found['high']:+.1f})"


def picture(logs: Mapping[str, Sequence[Mapping[str, Any]]], out: pathlib.Path) -> None:
  """Draws a column a log: gains against the number of experts above, user segments against experts below."""
  figure = Figure(figsize=(4.2 * len(logs), 6.6), layout="constrained")
  above, below = np.atleast_2d(figure.subplots(2, len(logs), squeeze=False))
  for axes, heat, (log, rows) in zip(above, below, logs.items()):
    found = gains(rows)
    x = [1, *found]
    for task in next(iter(found.values()), ()):
      axes.plot(x, [0, *(np.mean(found[e][task]) for e in found)], color="0.75", lw=0.8)
    means = [_mean_gain(found[e]) for e in found]
    y = np.array([0, *(m["mean"] for m in means)])
    half = [0, *(0 if m["low"] is None else m["high"] - m["mean"] for m in means)]
    axes.errorbar(x, y, half, marker="o", capsize=3, color="#3d85c6", label="mean of the tasks, 95 % over seeds")
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(EXPERTS, [str(e) for e in EXPERTS])
    axes.set(title=log.replace("_", " "), xlabel="experts, two of them active")
    shares = next((r["segments"] for r in rows if r["segments"]), None)
    if shares:
      lift = np.array(list(shares.values())) / np.mean(list(shares.values()), axis=0).clip(1e-6)
      shown = heat.imshow(lift, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
      heat.set_yticks(range(len(shares)), list(shares))
      heat.set_xticks(range(0, SHOWN_EXPERTS, 3))
      heat.set(xlabel=f"expert, of {SHOWN_EXPERTS}", title="tokens of a user segment,\nover those of the mean segment")
      figure.colorbar(shown, ax=heat, shrink=0.8)
    else:
      heat.set_axis_off()
  above[0].set_ylabel("gain over one expert,\n% of its lead over a constant")
  above[0].legend(fontsize=8, frameon=False)
  figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("log", nargs="?", help=f"{', '.join(LOGS)}; a folder follows a colon")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
  parser.add_argument("--picture", nargs="+", type=pathlib.Path)
  parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
  arguments, overrides = parser.parse_known_args()
  if arguments.picture:
    logs = {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in arguments.picture}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(logs, arguments.out)
    text = [line for log, rows in logs.items() for line in (f"## {log}", "", *table(rows), "")]
    arguments.out.with_suffix(".md").write_text("\n".join(text))
    return
  if arguments.log is None or arguments.log.partition(":")[0] not in LOGS:
    parser.error(f"name a log: {', '.join(LOGS)}; or --picture FILES")
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  done = set()
  if arguments.out.exists():
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    if any(r["overrides"] != overrides for r in rows):
      parser.error(f"{arguments.out} holds runs with other overrides, {rows[0]['overrides']}; name another --out")
    done = {(r["experts"], r["seed"]) for r in rows}
  if arguments.one:
    folder = arguments.out.with_suffix("")
    once = functools.partial(run_once, arguments.log, overrides, arguments.one, folder=folder)
    for seed in SEEDS:
      if (arguments.one, seed) not in done:
        row = once(seed)
        with arguments.out.open("a") as file:
          file.write(json.dumps(row) + "\n")
    return
  for i, experts in enumerate(arguments.experts):
    if any((experts, s) not in done for s in SEEDS):
      print(f"{i + 1} of {len(arguments.experts)}: {experts} experts", file=sys.stderr, flush=True)
      command = [sys.executable, __file__, arguments.log, "--out", str(arguments.out), "--one", str(experts)]
      subprocess.run([*command, *overrides], check=True)  # one process: the seeds share a program


if __name__ == "__main__":
  main()
