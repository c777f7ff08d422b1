"""Commands in processes of their own, and what runs log."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
  """Runs Python with these arguments in the project's folder; options are those of `subprocess.run`."""
  command = [sys.executable, *map(str, arguments)]
  return subprocess.run(command, **dict(cwd=ROOT, capture_output=True, text=True) | options)


def read_log(workdir: pathlib.Path) -> list[dict[str, object]]:
  """The lines of a run's log; none before its first."""
  path = workdir / 'metrics.jsonl'
  return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def logged(workdir: pathlib.Path, metric: str = 'train/loss') -> dict[int, float]:
  """A metric by step."""
  return {line['step']: line[metric] for line in read_log(workdir) if metric in line}
