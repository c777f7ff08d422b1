"""The peer of benchmarks/train_step.py and benchmarks/inference.py: transformers' GroupViT in PyTorch.

Texts are padded to 77 tokens with a mask, as its processor makes them. Its caption loss; the multi-label loss on top,
on the same embeddings; its Gumbel noise; AdamW as one operation. It has neither stochastic depth nor random erasing,
and clips no gradient.
"""

import argparse
import time
from collections.abc import Callable

import torch
import transformers

from benchmarks import caption_lengths, rounds

VOCAB, CONTEXT, PROMPTS = 49_408, 77, 3


def make_model(size: int) -> transformers.GroupViTModel:
  """GroupViT-S/16, random weights."""
  config = transformers.GroupViTConfig(
      text_config=dict(vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
                       num_attention_heads=4, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
                       pad_token_id=1),
      vision_config=dict(image_size=size, hidden_size=384, intermediate_size=1536, depths=[6, 3, 3],
                         num_group_tokens=[64, 8, 0], num_output_groups=[64, 8, 0], num_attention_heads=6),
      projection_dim=256, projection_intermediate_dim=4096)
  torch.manual_seed(0)
  return transformers.GroupViTModel(config)


def multi_label_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
  """Contrast of B images with their prompts, logits [B * M, B]: the mean of both directions."""
  count, batch = logits_per_text.shape
  own = torch.eye(batch).repeat_interleave(count // batch, dim=0)
  to_text = torch.nn.functional.cross_entropy(logits_per_text.t(), own.t() * batch / count)
  to_image = torch.nn.functional.cross_entropy(logits_per_text, own.argmax(dim=1))
  return (to_text + to_image) / 2


def train(model: transformers.GroupViTModel, batch: int, compiled: bool) -> Callable[[], None]:
  """What runs one training step."""
  tokens = torch.from_numpy(caption_lengths.draw_tokens(batch, PROMPTS, CONTEXT, VOCAB)).long()
  flat = tokens.reshape(-1, CONTEXT)
  mask = torch.cat([torch.ones(len(flat), 1), (flat[:, :-1] != 1).float()], dim=1).long()
  images = torch.randn(batch, 3, 224, 224)
  prompt = torch.arange(len(flat)) % (1 + PROMPTS) > 0
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
  model.train()
  caption_loss = transformers.models.groupvit.modeling_groupvit.image_text_contrastive_loss

  def loss(images: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=texts, pixel_values=images, attention_mask=mask).logits_per_text
    return caption_loss(logits[~prompt]) + multi_label_loss(logits[prompt])
  loss = torch.compile(loss) if compiled else loss

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(images, flat, mask).backward()
    optimizer.step()
  return run


def encode(model: transformers.GroupViTModel, batch: int, size: int, compiled: bool) -> Callable[[], None]:
  """What embeds a batch of pictures once."""
  model.eval()
  images = torch.randn(batch, 3, size, size)
  apply = lambda images: model.get_image_features(pixel_values=images).pooler_output
  apply = torch.compile(apply) if compiled else apply

  @torch.inference_mode()
  def run() -> None:
    apply(images)
  return run


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('work', choices=('train', 'encode'))
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--compile', action='store_true')
  args = parser.parse_args()
  model = make_model(args.size)
  run = train(model, args.batch, args.compile) if args.work == 'train' else encode(
      model, args.batch, args.size, args.compile)
  started = time.perf_counter()
  run()
  first = time.perf_counter() - started

  def work(_: int) -> int:
    run()
    return args.batch
  rounds.serve({'torch': torch.__version__, 'transformers': transformers.__version__, 'first_s': first,
                'threads': torch.get_num_threads()}, {args.work: work})


if __name__ == '__main__':
  main()
