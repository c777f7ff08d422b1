"""Weights by their id on the Hub, from a server on loopback; and exports that are uploaded to it."""

import os
import pathlib
import sys

import huggingface_hub
from huggingface_hub import constants
import numpy as np
import pytest

from groupvit_jax import Predictor
from groupvit_jax.commands.export import export
from groupvit_jax.commands.import_weights import import_weights
from groupvit_jax.errors import Unavailable, UserError
from groupvit_jax.interop import hub
from groupvit_jax.train import initial_weights
from tests.hub import COMMIT, Hub, TOKEN
from tests.tiny import tiny_config
from tests.trained import trained_workdir

NAME = 'someone/tiny-groupvit'


@pytest.fixture(scope='module')
def exported(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('hub') / 'exported'
  export(str(trained_workdir()), 'huggingface', str(folder))
  (folder / 'tf_model.h5').write_bytes(b'not ours')
  return folder


@pytest.fixture
def server(exported, tmp_path, monkeypatch):
  hub._download.cache_clear()
  with Hub({NAME: exported}).running() as server:
    monkeypatch.setattr(constants, 'ENDPOINT', server.address)
    template = server.address + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr(huggingface_hub, 'create_repo', huggingface_hub.HfApi(server.address).create_repo)
    monkeypatch.setattr(huggingface_hub, 'upload_folder', huggingface_hub.HfApi(server.address).upload_folder)
    yield server


def test_an_id_stands_for_its_folder_wherever_weights_are_read(server, exported, tmp_path):
  predictor, image = Predictor.from_pretrained(f'{NAME}@v1'), np.zeros((32, 32, 3), np.uint8)
  np.testing.assert_allclose(
    predictor(image, ['dog', 'grass']).class_scores,
    Predictor.from_pretrained(exported)(image, ['dog', 'grass']).class_scores,
  )
  assert f'; {NAME}@v1; ' in repr(predictor)
  kept = hub.fetch(f'{NAME}@v1')
  assert kept.name == COMMIT and {path.name for path in kept.iterdir()} == set(os.listdir(exported)) - {'tf_model.h5'}
  config = tiny_config()
  config.init_from = NAME
  assert initial_weights.with_tokenizer(config).path == str(kept)
  assert initial_weights.read_source(NAME).eos_id == 1
  server.shutdown()  # the cache is enough
  hub._download.cache_clear()
  assert NAME in import_weights(NAME, str(tmp_path / 'run'))


def test_a_download_that_breaks_off_is_resumed(server, exported):
  server.cuts = 1
  weights = hub.fetch(NAME) / 'model.safetensors'
  assert not server.cuts and weights.read_bytes() == (exported / 'model.safetensors').read_bytes()


def test_a_local_folder_wins(server, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / NAME).mkdir(parents=True)
  assert str(hub.fetch(NAME)) == NAME


def test_what_cannot_be_had_takes_one_line(server, tmp_path, monkeypatch):
  def refused(name: str, message: str, kind: type[UserError] = UserError) -> None:
    with pytest.raises(kind, match=message) as caught:
      hub.fetch(name)
    assert isinstance(caught.value, Unavailable) == (kind is Unavailable) and '\n' not in str(caught.value)

  refused('someone/none', 'there is no folder someone/none, and from the Hub: no model someone/none is visible')
  refused(f'{NAME}@v2', 'has no revision v2; name a branch')
  server.gated.add(NAME)
  refused(NAME, f'needs a permission; ask for it at {server.address}/{NAME}, and run hf auth login')
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  assert hub.fetch(NAME).name == COMMIT
  server.down = True
  refused('someone/other', f'cannot reach {server.address}: .*503', Unavailable)
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
  refused('someone/other', 'cannot reach http://127.0.0.1:1: ', Unavailable)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  refused('someone/other', 'HF_HUB_OFFLINE is set and someone/other is not in the cache')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  refused('someone/other', r"to download it from the Hub, pip install 'groupvit-jax\[hub\]'")


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of the library, about its own HTTP client
def test_an_export_is_uploaded_with_its_card(server, tmp_path, monkeypatch):
  def push(name: str, folder: str) -> str:
    return export(str(trained_workdir()), 'safetensors', str(tmp_path / folder), licence='apache-2.0', push_to_hub=name)

  with pytest.raises(UserError, match='--push_to_hub=me/mine: no model me/mine is visible; .* hf auth login'):
    push('me/mine', 'out')
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  for name, message in (('others/theirs', 'needs a permission'), ('mine', 'name a model as USER/NAME')):
    with pytest.raises(UserError, match=message):
      push(name, 'out')
  assert not (tmp_path / 'out').exists()
  assert push('me/mine', 'out').endswith(f'uploaded to {server.address}/me/mine')
  assert server.uploaded['me/mine'] == {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
  card = server.uploaded['me/mine']['README.md'].decode()
  assert card.startswith('---\nlicense: apache-2.0\n') and "Predictor.from_pretrained('me/mine')" in card
