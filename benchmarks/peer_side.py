"""The peer of the comparisons: transformers' GroupViT in PyTorch, eager or compiled.

Training: its caption loss; the multi-label loss on top, on the same embeddings; its Gumbel noise; AdamW as one
operation. It has neither stochastic depth nor random erasing, and clips no gradient. Texts are padded to 77 tokens with
a mask, or with --longest to the longest of the batch, as `padding=True` of its processor does: always the same batch
here, so that torch.compile has one length to compile for. In bfloat16 it runs under autocast.

Windows: one pass for the pooled feature and the assignments, many windows at once, and the last stage's map alone
resized: less than its own `output_segmentation` computes.
"""

import argparse
from collections.abc import Callable
import contextlib
import time

import torch
from torch.nn import functional
import transformers

from benchmarks import caption_lengths, processes

VOCAB, CONTEXT, PROMPTS = 49_408, 77, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_model(size: int) -> transformers.GroupViTModel:
  """GroupViT-S/16, random weights, with positions for images of `size` pixels; texts start with 0 and end with 1."""
  torch.manual_seed(0)
  return transformers.GroupViTModel(
    transformers.GroupViTConfig(
      vision_config=dict(image_size=size), text_config=dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    )
  )


def multi_label_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
  """Contrast of B images with their prompts, logits [B * M, B]: the mean of both directions."""
  count, batch = logits_per_text.shape
  own = torch.eye(batch, device=logits_per_text.device).repeat_interleave(count // batch, dim=0)
  to_text = functional.cross_entropy(logits_per_text.t(), own.t() * batch / count)
  return (to_text + functional.cross_entropy(logits_per_text, own.argmax(dim=1))) / 2


def training(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """Returns a function that runs one training step."""
  tokens = torch.from_numpy(caption_lengths.draw_tokens(args.batch, PROMPTS, CONTEXT, VOCAB)).long()
  flat = tokens.reshape(-1, CONTEXT)
  mask = torch.cat([torch.ones(len(flat), 1), (flat[:, :-1] != 1).float()], dim=1).long()
  longest = int(mask.sum(dim=1).max()) if args.longest else CONTEXT
  flat, mask = flat[:, :longest].to(args.device), mask[:, :longest].to(args.device)
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


def encoding(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """Returns a function that embeds a batch of images."""
  images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
  return inference(model, lambda images: model.get_image_features(pixel_values=images).pooler_output, images, args)


def windows(model: transformers.GroupViTModel, args: argparse.Namespace) -> Callable[[], None]:
  """Returns a function that finds the segment of each pixel, and embeddings of the segments and of the whole."""
  pixels = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=args.device)
  mean, std = (torch.tensor(values, device=args.device)[:, None, None] for values in (MEAN, STD))

  def segment(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = model.vision_model((pixels.float() / 255 - mean) / std, output_attentions=True)
    affinity = out.attentions[1] @ out.attentions[0]  # [B, 8, N]
    grid = affinity.float().reshape(args.batch, -1, args.size // 16, args.size // 16)
    maps = functional.interpolate(grid, (args.size, args.size), mode='bilinear', align_corners=False)
    segments = model.visual_projection(out.last_hidden_state.flatten(0, 1))
    return maps.argmax(dim=1).to(torch.uint8), segments, model.visual_projection(out.pooler_output)

  return inference(model, segment, pixels, args)


def inference(
  model: transformers.GroupViTModel, apply: Callable, inputs: torch.Tensor, args: argparse.Namespace
) -> Callable[[], None]:
  """Returns a function that applies another to its inputs, without gradients."""
  model.eval()
  apply = compiled(apply, args)

  @torch.inference_mode()
  def run() -> None:
    with precision(args):
      apply(inputs)

  return run


def compiled(function: Callable, args: argparse.Namespace) -> Callable:
  return torch.compile(function) if args.compile else function


def precision(args: argparse.Namespace) -> contextlib.AbstractContextManager:
  return torch.autocast(args.device, torch.bfloat16) if args.dtype == 'bfloat16' else contextlib.nullcontext()


def main() -> None:
  """Serves rounds, once the first step is done: torch compiles in it."""
  parser = argparse.ArgumentParser()
  parser.add_argument('work', choices=('training', 'encoding', 'windows'))
  for name, kind in dict(batch=int, size=int, device=str, dtype=str).items():
    parser.add_argument(f'--{name}', type=kind, required=True)
  parser.add_argument('--longest', action='store_true')
  parser.add_argument('--compile', action='store_true')
  args = parser.parse_args()
  args.device = {'cpu': 'cpu', 'gpu': 'cuda'}[args.device]
  on_gpu = args.device == 'cuda'
  model = make_model(args.size).to(args.device)
  run = {'training': training, 'encoding': encoding, 'windows': windows}[args.work](model, args)

  def work(images: int) -> int:
    steps = -(-images // args.batch)
    for _ in range(steps):
      run()
    if on_gpu:
      torch.cuda.synchronize()
    return steps * args.batch

  started = time.perf_counter()
  work(1)
  facts = {'torch': torch.__version__, 'transformers': transformers.__version__, 'threads': torch.get_num_threads()}
  facts['first_s'] = time.perf_counter() - started
  peak_mb = (lambda: torch.cuda.max_memory_allocated() / 2**20) if on_gpu else processes.process_peak_mb
  processes.serve(facts, {args.work: work}, peak_mb)


if __name__ == '__main__':
  main()
