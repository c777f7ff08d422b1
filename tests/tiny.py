"""The smallest whole model and the smallest whole run, for tests that are not about size."""

from flax import linen as nn
import ml_collections

from configs import quickstart
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.layers import Remat
from groupvit_jax.model.text import TextTower
from groupvit_jax.model.vision import StageSpec, VisionInit, VisionTower


def tiny_model(remat: Remat = 'none', **vision) -> ImageTextModel:
  """Two grouping stages (4 and 2 segments) over 16 patches; texts of up to 6 tokens of 20, EOS 2."""
  normal = nn.initializers.normal(0.2)
  fields = dict(
    image_size=(16, 16),
    patch_size=4,
    width=8,
    num_heads=2,
    stages=(StageSpec(1, 4, 4), StageSpec(1, 2, 2), StageSpec(1, 0, 0)),
    init=VisionInit(normal, normal, normal, normal, normal),
    drop_path=0.1,
    remat=remat,
  )
  return ImageTextModel(
    vision=VisionTower(**(fields | vision)),
    text=TextTower(vocab_size=20, context_length=6, width=8, depth=1, num_heads=2, eos_id=2, remat=remat),
    embed_dim=8,
    projector_dim=16,
    multi_label=True,
  )


class Letters(Tokenizer):
  """A token for each letter, the last ones first: class names at the end of a prompt are not cut off."""

  vocab_size, bos_id, eos_id, pad_id = 20, None, 2, 0

  def __init__(self):
    super().__init__({})

  def _text_ids(self, text: str) -> list[int]:
    return [3 + ord(letter) % 17 for letter in reversed(text)]


def tiny_config() -> ml_collections.ConfigDict:
  """The quickstart, shrunk until a run takes seconds: 32-px scenes, width 16, 6 steps of 8 pictures."""
  config = quickstart.get_config()
  config.total_steps, config.batch_size, config.log_every = 6, 8, 1
  config.checkpoint.every_steps, config.eval.every_steps, config.eval.panel_steps = 2, 3, ()
  config.data.num_prompts = 1
  config.multi_label_loss, config.data.prompt_templates, config.data.skipped_words = 'pooled', 'full', ()
  config.text_budget = 20
  config.data.scenes.num_heldout = 8
  config.tokenizer.num_captions = 300
  config.model.embed_dim, config.model.projector_dim = 16, 16
  config.model.vision.update(image_size=(32, 32), width=16, num_heads=2, drop_path=0.1)
  config.model.text.update(width=16, num_heads=2, depth=1)
  config.optim.warmup_steps = 2
  return config
