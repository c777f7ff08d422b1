"""The launch scripts, with stand-ins for the schedulers' commands."""

import os
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
TARS = 'gs://bucket/cc3m/{00000..00331}.tar'


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
  """A command that notes its arguments, each call ended by an empty one, and does what `body` says."""
  path = folder / name
  path.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" "" >>"{folder}/calls"\n{body}\n')
  path.chmod(0o755)


def read_calls(folder: pathlib.Path) -> list[list[str]]:
  return [call.split('\0') for call in (folder / 'calls').read_text().removesuffix('\0\0').split('\0\0')]


def run(folder: pathlib.Path, script: str, *arguments: str, **environment: str) -> tuple[int, list[list[str]], str]:
  """Exit code, the calls of stand-ins, and what was said."""
  environment = os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'} | environment
  done = subprocess.run(
    ['bash', ROOT / 'launch' / script, *arguments],
    cwd=folder,
    env=environment,
    text=True,
    capture_output=True,
    timeout=60,
  )
  return done.returncode, read_calls(folder), done.stdout + done.stderr


@pytest.mark.parametrize(
  'codes, code, goes_on',
  [
    ('0 0', 0, False),
    ('2 2', 2, False),
    ('1 137', 137, False),
    ('2 137', 137, False),  # the first alone says why
    ('69 134', 134, True),
    ('75 75', 75, True),
    ('134 134', 134, True),
    ('137 137', 137, True),
    ('143 143', 143, True),
  ],
)
def test_slurm_goes_on_where_that_helps(codes, code, goes_on, tmp_path):
  """Two tasks end with these codes, and srun with the larger one."""
  python = tmp_path / '.venv/bin/python'
  python.parent.mkdir(parents=True)
  stand_in(python.parent, 'python', 'exit $CODE')
  stand_in(
    tmp_path,
    'srun',
    'while [[ $1 != bash ]]; do shift; done; worst=0\n'
    'for CODE in $CODES; do export CODE; "$@"; code=$?; ((code > worst)) && worst=$code; done; exit $worst',
  )
  stand_in(tmp_path, 'scontrol', '')
  ended, calls, _ = run(
    tmp_path,
    'slurm.sbatch',
    'config.py:8gpu',
    '/shared/run',
    f'--config.path={TARS}',
    SLURM_JOB_ID='7',
    SLURM_CPUS_PER_TASK='12',
    CODES=codes,
  )
  assert ended == code and (['scontrol', 'requeue', '7'] in calls) == goes_on
  assert '--cpus-per-task=12' in calls[0]
  assert read_calls(python.parent)[0] == [
    'python',
    'train.py',
    '--config=config.py:8gpu',
    '--workdir=/shared/run',
    f'--config.path={TARS}',
  ]
  assert not list(tmp_path.glob('.mistake*'))


def test_slurm_passes_a_signal_on_and_waits(tmp_path):
  """The shell around the program is told, twice, and alone; the program takes a while to save."""
  python = tmp_path / '.venv/bin/python'
  python.parent.mkdir(parents=True)
  stand_in(
    python.parent,
    'python',
    'trap "sleep 0.3; exit 75" TERM; touch "$FOLDER/begun"\nfor _ in {1..200}; do sleep 0.1; done',
  )
  stand_in(
    tmp_path,
    'srun',
    'while [[ $1 != bash ]]; do shift; done; "$@" & pid=$!\n'
    'until [[ -e $FOLDER/begun ]]; do sleep 0.1; done; kill $pid; sleep 0.1; kill $pid; wait $pid',
  )
  stand_in(tmp_path, 'scontrol', '')
  code, calls, said = run(tmp_path, 'slurm.sbatch', 'config.py', 'run', SLURM_JOB_ID='7', FOLDER=str(tmp_path))
  assert code == 75 and ['scontrol', 'requeue', '7'] in calls, said


# Its state changes while it is asked for: $FOLDER/state holds what it says, one line after the other, then the last.
GCLOUD = r"""
state=$FOLDER/state
next() { head -1 "$1"; sed -i 1d "$1"; }
case $* in
  *queued-resources\ describe*)
    if [[ -s $FOLDER/hiccups ]]; then next "$FOLDER/hiccups" >&2; exit 1; fi
    if [[ ! -e $state ]]; then echo 'ERROR: (gcloud) NOT_FOUND: Resource' >&2; exit 1; fi
    if (($(wc -l <"$state") > 1)); then next "$state"; else cat "$state"; fi ;;
  *queued-resources\ create*) cp "$FOLDER/states" "$state" ;;
  *queued-resources\ delete*) rm "$state" ;;
  *train.py*) next "$FOLDER/runs" ;;
  *-m\ venv*)
    if [[ -d $FOLDER/host ]]; then
      cd "$FOLDER/host"
      for word; do if [[ $word == --command=* ]]; then exec bash -c "${word#--command=}"; fi; done
    fi ;;
esac"""


def tpu_pod(
  folder: pathlib.Path, runs: list[str], states: list[str], **environment: str
) -> tuple[int, list[list[str]], str]:
  """The script, where runs say this one after the other, and each request goes through these states."""
  for name, lines in (('runs', runs), ('states', states)):
    (folder / name).write_text(''.join(f'{line}\n' for line in lines))
  stand_in(folder, 'gcloud', GCLOUD)
  stand_in(folder, 'git', '')
  return run(
    folder,
    'tpu_pod.sh',
    'name',
    'zone',
    'v5litepod-64',
    'config.py',
    'gs://bucket/run',
    f'--config.path={TARS}',
    FOLDER=str(folder),
    SECONDS_BETWEEN='0',
    **environment,
  )


def count(calls: list[list[str]], *words: str) -> int:
  return sum(all(any(word in part for part in call) for word in words) for call in calls)


def test_a_tpu_is_requested_awaited_used_and_given_back(tmp_path):
  code, calls, said = tpu_pod(tmp_path, ['exit-code 0'], ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'])
  assert code == 0, said
  assert count(calls, 'create') == count(calls, 'delete') == count(calls, 'train.py') == count(calls, 'scp') == 1
  (told,) = (part for call in calls for part in call if 'train.py' in part)
  words = shlex.split(re.search('cd groupvit; (.*?) & pid', told)[1])
  assert words == [
    '.venv/bin/python',
    'train.py',
    '--config=config.py',
    '--workdir=gs://bucket/run',
    f'--config.path={TARS}',
  ]


def test_a_request_that_waits_is_waited_for(tmp_path):
  """Nothing is requested a second time, nor taken back."""
  (tmp_path / 'state').write_text('WAITING_FOR_RESOURCES\nACTIVE\n')
  code, calls, said = tpu_pod(tmp_path, ['exit-code 0'], [])
  assert code == 0 and not count(calls, 'create') and count(calls, 'delete') == 1, said


def test_what_cannot_be_asked_is_asked_again(tmp_path):
  """An expired login and a hiccup do not mean that there is no TPU."""
  (tmp_path / 'state').write_text('ACTIVE\n')
  (tmp_path / 'hiccups').write_text('ERROR: there was a problem refreshing your tokens\nERROR: UNAVAILABLE\n')
  code, calls, said = tpu_pod(tmp_path, ['exit-code 0'], [])
  assert code == 0 and not count(calls, 'create') and 'refreshing your tokens' in said, said
  assert count(calls, 'describe') == 3


@pytest.mark.parametrize(
  'version, pip, code, message, attempts',
  [
    ('0', 'exit 0', 0, 'done', 1),
    ('1', 'exit 0', 2, 'no Python 3.11 or later; name one that is there with PYTHON=', 1),
    ('0', 'echo no such wheel; exit 1', 1, 'gave up', 3),
  ],
)
def test_what_cannot_be_installed_ends(version, pip, code, message, attempts, tmp_path):
  """On a host, for which a folder stands in here, whose interpreter is too old, or whose requirements fail."""
  (tmp_path / 'host/groupvit/.venv/bin').mkdir(parents=True)
  stand_in(tmp_path / 'host/groupvit/.venv/bin', 'pip', pip)
  stand_in(tmp_path, 'python3.99', f'if [[ $1 == -c ]]; then exit {version}; fi')
  stand_in(tmp_path, 'tar', '')
  ended, calls, said = tpu_pod(tmp_path, ['exit-code 0'], ['ACTIVE'], PYTHON='python3.99')
  assert ended == code and message in said, said
  assert count(calls, 'scp') == attempts and count(calls, 'train.py') == (code == 0)


def test_what_is_lost_or_preempted_goes_on(tmp_path):
  """A process is lost; a connection breaks, and what it left behind is ended; the slice is taken away; then the end."""
  runs = ['exit-code 69', '', 'exit-code 0']
  code, calls, said = tpu_pod(tmp_path, runs, ['ACTIVE', 'ACTIVE', 'SUSPENDED', 'ACTIVE'])
  assert code == 0, said
  assert count(calls, 'train.py') == 3 == count(calls, 'kill -TERM') and count(calls, 'create') == 2


@pytest.mark.parametrize(
  'runs, states, code, message',
  [
    (['exit-code 2'], ['ACTIVE'], 2, 'the request has a mistake'),
    (['exit-code 1'] * 9, ['ACTIVE'], 1, 'gave up'),
    ([], ['WAITING_FOR_RESOURCES', 'FAILED'], 1, 'the request failed'),
  ],
)
def test_what_cannot_go_on_ends(runs, states, code, message, tmp_path):
  ended, calls, said = tpu_pod(tmp_path, runs, states)
  assert ended == code and message in said, said
  assert count(calls, 'train.py') == min(len(runs), 3) and not count(calls, 'delete')


def test_gke_starts_again_but_for_a_mistake():
  jobset = yaml.safe_load((ROOT / 'launch/gke.yaml').read_text())
  policy, (replicated,) = jobset['spec']['failurePolicy'], jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  (mistake,) = job['podFailurePolicy']['rules']
  (container,) = job['template']['spec']['containers']
  assert mistake['action'] == 'FailJob' and mistake['onExitCodes'] == dict(
    containerName=container['name'], operator='In', values=[2]
  )
  assert policy['rules'] == [dict(action='FailJobSet', onJobFailureReasons=['PodFailurePolicy'])]
  assert job['backoffLimit'] == 0 and policy['maxRestarts'] == 100  # any other end restarts all pods together
  assert job['completions'] == job['parallelism'] == 16 and job['completionMode'] == 'Indexed'
  assert job['template']['spec']['restartPolicy'] == 'Never'  # which a policy for failures asks for
  name, config, _ = container['command']
  assert tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['scripts'][name]
  assert (ROOT / 'configs' / f'{config.removeprefix("--config=")}.py').exists()
