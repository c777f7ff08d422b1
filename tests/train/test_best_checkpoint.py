"""The best checkpoint is the one that best.json names."""

import json

from etils import epath
import pytest

from groupvit_jax import storage
from groupvit_jax.train.checkpoint import BEST_FOLDER, BestCheckpoint, Checkpoints
from tests import folder_bucket
from tests.tiny import tiny_config
from tests.train.test_checkpoint import state  # noqa: F401


@pytest.mark.parametrize('remote', [False, True])
def test_a_better_step_than_a_newer_one_is_kept(remote, state, tmp_path, monkeypatch):  # noqa: F811
  """As after going back behind a damaged checkpoint."""
  if remote:
    folder_bucket.use(monkeypatch, tmp_path)
    monkeypatch.setattr(storage, '_systems', {})
  workdir = 's3://bucket/run' if remote else str(tmp_path / 'run')
  for step, value in ((500, 0.5), (450, 0.6)):
    best = BestCheckpoint(workdir, 'eval/x/miou')  # of another start
    assert best.offer({'eval/x/miou': value}, state.replace(step=state.step + step), tiny_config(), {})
    best.close()
  kept = Checkpoints(workdir, keep=1, read_only=True, folder=BEST_FOLDER)
  assert kept.steps() == [450] == [json.loads((epath.Path(workdir) / 'best.json').read_text())['step']]
  kept.close()
