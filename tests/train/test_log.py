"""What a run tells people: on a terminal, in a file, and where the disk is full."""

import contextlib
import json
import os
import re
import sys
import termios
import time

import pytest

from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.log import RunLog
from tests.board import read_board
from tests.runs import logged, read_log
from tests.tiny import tiny_config
from tests.train.test_checkpoint import no_room_for


def told_through(monkeypatch, read_end: int, write_end: int, workdir) -> str:
  """What a log writes to stderr when that is `write_end`."""
  with os.fdopen(write_end, 'w') as stderr:
    monkeypatch.setattr(sys, 'stderr', stderr)
    log = RunLog(workdir, first_step=4, total_steps=10, batch_size=8)
    for step in (5, 6):
      time.sleep(0.15)  # longer than a bar waits before it draws itself again
      log.train(step, {'loss': 2.5 - step / 10})
    log.message('a line in between')
    log.close()
    stderr.flush()
    os.set_blocking(read_end, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
      while True:
        parts.append(os.read(read_end, 4096))
  os.close(read_end)
  monkeypatch.undo()
  return b''.join(parts).decode()


def test_a_bar_on_a_terminal(monkeypatch, tmp_path):
  master, slave = os.openpty()
  termios.tcsetwinsize(slave, (24, 120))
  shown = told_through(monkeypatch, master, slave, tmp_path)
  assert re.search(r'\r.*60%.* 6/10 \[\d+:\d+<\d+:\d+.*loss=1\.9000, img/s=\d+', shown), repr(shown)
  assert 'a line in between' in shown and 'images/s' not in shown


def test_plain_lines_elsewhere(monkeypatch, tmp_path):
  lines = told_through(monkeypatch, *os.pipe(), tmp_path).splitlines()
  assert len(lines) == 3 and '\r' not in ''.join(lines)
  for step, line in zip((5, 6), lines):
    assert re.fullmatch(rf'step {step}/10  loss {2.5 - step / 10:.4f}  \d+ images/s  0:0\d left', line), line
  assert lines[2] == 'a line in between'


def test_images_per_second_leave_out_what_was_paused(tmp_path):
  log = RunLog(tmp_path, first_step=0, total_steps=10, batch_size=8)
  with log.paused():
    time.sleep(0.5)
  time.sleep(0.1)
  log.train(1, {'loss': 1.0})
  log.close()
  rate = logged(tmp_path, 'train/images_per_s')[1]
  assert 8 / 0.3 < rate <= 8 / 0.1


def test_a_run_that_goes_on_drops_what_it_will_log_again(tmp_path):
  lines = [json.dumps(dict(step=step, **{'eval/a/x': 0.5})) for step in (1, 2, 3)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join([*lines, '{"step": 3, "ev']))
  log = RunLog(tmp_path, first_step=2, total_steps=9, batch_size=8)
  assert log.resumed_metrics == {'step', 'eval/a/x'}
  log.metrics(3, {'x': float('nan')})
  log.close()
  found = read_log(tmp_path)
  assert [line['step'] for line in found] == [1, 2, 3] and found[-1] == {'step': 3, 'x': None}
  assert read_board(tmp_path / 'tensorboard')['x'][0] == 3


def test_a_full_disk_is_one_line_that_names_the_file_and_loses_nothing(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(before := '{"step": 1, "x": 0.5}\n{"step": 2, "x": 0.5}\n')
  with no_room_for(10), pytest.raises(OSError, match=f'cannot write {path}: File too large; make room'):
    RunLog(tmp_path, first_step=1, total_steps=9, batch_size=8)
  assert path.read_text() == before and [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
  log = RunLog(tmp_path, first_step=2, total_steps=9, batch_size=8)
  with no_room_for(50), pytest.raises(OSError, match=f'cannot write {tmp_path}: File too large; make room'):
    for step in range(3, 50):  # tensorboardX's own writer would wait for ever at the thirteenth
      log.metrics(step, {'x': 0.5})
  log.close()
  with no_room_for(10), pytest.raises(OSError, match='cannot write .*config.json: File too large; make room'):
    workdir_lib.write_config(tmp_path / 'run', tiny_config())
  assert not any((tmp_path / 'run').iterdir())
