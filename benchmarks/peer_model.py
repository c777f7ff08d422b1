"""The peer of the speed benchmarks: transformers' GroupViT in PyTorch, eager or compiled.

Training: its caption loss; the multi-label loss on top, on the same embeddings; its Gumbel noise; AdamW as one
operation. It has neither stochastic depth nor random erasing, and clips no gradient. Texts are padded to 77 tokens with
a mask, or with --longest to the longest of the batch, which is what `padding=True` of its processor does: always the
same batch here, so that torch.compile has one length to compile for. In bfloat16 it runs under autocast.

Windows: one pass for the pooled feature and the assignments, many windows at once, and the last stage's map alone
resized: less than its own `output_segmentation` computes.
"""

import argparse
from collections.abc import Callable
import contextlib
import time

import torch
import transformers

from benchmarks import caption_lengths, rounds

VOCAB, CONTEXT, PROMPTS = 49_408, 77, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_model(size: int) -> transformers.GroupViTModel:
  """GroupViT-S/16, random weights, with positions for pictures of `size` pixels."""
  config = transformers.GroupViTConfig(
    text_config=dict(
      vocab_size=VOCAB,
      hidden_size=256,
      intermediate_size=1024,
      num_hidden_layers=12,
      num_attention_heads=4,
      max_position_embeddings=CONTEXT,
      bos_token_id=0,
      eos_token_id=1,
      pad_token_id=1,
    ),
    vision_config=dict(
      image_size=size,
      hidden_size=384,
      intermediate_size=1536,
      depths=[6, 3, 3],
      num_group_tokens=[64, 8, 0],
      num_output_groups=[64, 8, 0],
      num_attention_heads=6,
    ),
    projection_dim=256,
    projection_intermediate_dim=4096,
  )
  torch.manual_seed(0)
  return transformers.GroupViTModel(config)


def multi_label_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
  """Contrast of B images with their prompts, logits [B * M, B]: the mean of both directions."""
  count, batch = logits_per_text.shape
  own = torch.eye(batch, device=logits_per_text.device).repeat_interleave(count // batch, dim=0)
  to_text = torch.nn.functional.cross_entropy(logits_per_text.t(), own.t() * batch / count)
  to_image = torch.nn.functional.cross_entropy(logits_per_text, own.argmax(dim=1))
  return (to_text + to_image) / 2


def train(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """What runs one training step."""
  tokens = torch.from_numpy(caption_lengths.draw_tokens(args.batch, PROMPTS, CONTEXT, VOCAB)).long()
  flat = tokens.reshape(-1, CONTEXT)
  mask = torch.cat([torch.ones(len(flat), 1), (flat[:, :-1] != 1).float()], dim=1).long()
  if args.longest:
    longest = int(mask.sum(dim=1).max())
    flat, mask = flat[:, :longest], mask[:, :longest]
  flat, mask = flat.to(args.device), mask.to(args.device)
  images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
  model.train()
  caption_loss = transformers.models.groupvit.modeling_groupvit.image_text_contrastive_loss

  def loss(images: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=texts, pixel_values=images, attention_mask=mask).logits_per_text
    logits = logits.reshape(-1, 1 + PROMPTS, args.batch)
    return caption_loss(logits[:, 0]) + multi_label_loss(logits[:, 1:].reshape(-1, args.batch))

  loss = compiled(loss, args)

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    with precision(args):
      total = loss(images, flat, mask)
    total.backward()
    optimizer.step()

  return run


def encode(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """What embeds a batch of pictures once."""
  images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
  return inference(model, lambda images: model.get_image_features(pixel_values=images).pooler_output, images, args)


def windows(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """What finds the segment of each pixel, and embeddings of the segments and of the whole, once."""
  pixels = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=args.device)
  mean, std = (torch.tensor(values, device=args.device)[:, None, None] for values in (MEAN, STD))

  def segment(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = model.vision_model((pixels.float() / 255 - mean) / std, output_attentions=True)
    affinity = out.attentions[1] @ out.attentions[0]  # [B, 8, N]
    grid = affinity.float().reshape(args.batch, -1, args.size // 16, args.size // 16)
    maps = torch.nn.functional.interpolate(grid, (args.size, args.size), mode='bilinear', align_corners=False)
    segments = model.visual_projection(out.last_hidden_state.flatten(0, 1))
    return maps.argmax(dim=1).to(torch.uint8), segments, model.visual_projection(out.pooler_output)

  return inference(model, segment, pixels, args)


def inference(
  model: transformers.GroupViTModel, apply: Callable, inputs: torch.Tensor, args: argparse.Namespace
) -> Callable[[], None]:
  """What applies something to its inputs once."""
  model.eval()
  apply = compiled(apply, args)

  @torch.inference_mode()
  def run() -> None:
    with precision(args):
      apply(inputs)

  return run


def compiled(function: Callable, args: argparse.Namespace) -> Callable:
  """The function, compiled if that is asked for."""
  return torch.compile(function, mode=args.compile) if args.compile else function


def precision(args: argparse.Namespace) -> contextlib.AbstractContextManager:
  """Autocast, or nothing."""
  half = args.dtype == 'bfloat16'
  return torch.autocast(args.device, torch.bfloat16) if half else contextlib.nullcontext()


def wait(args: argparse.Namespace) -> None:
  """Until all that was started is done."""
  if args.device == 'cuda':
    torch.cuda.synchronize()


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('work', choices=('train', 'encode', 'windows'))
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--longest', action='store_true', help='Pad texts to the longest of the batch.')
  parser.add_argument('--compile', choices=('default', 'reduce-overhead'), help='Mode of torch.compile.')
  args = parser.parse_args()
  args.device = {'cpu': 'cpu', 'gpu': 'cuda'}[args.device]
  return args


def main() -> None:
  """Serves rounds."""
  args = parse()
  model = make_model(args.size).to(args.device)
  run = {'train': train, 'encode': encode, 'windows': windows}[args.work](model, args)
  started = time.perf_counter()
  run()
  wait(args)
  first = time.perf_counter() - started

  def work(pictures: int) -> int:
    steps = -(-pictures // args.batch)
    for _ in range(steps):
      run()
    wait(args)
    return steps * args.batch

  on_gpu = args.device == 'cuda'
  peak_mb = (lambda: torch.cuda.max_memory_allocated() / 2**20) if on_gpu else rounds.process_peak_mb
  rounds.serve(
    {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'first_s': first,
      'threads': torch.get_num_threads(),
    },
    {args.work: work},
    peak_mb,
  )


if __name__ == '__main__':
  main()
