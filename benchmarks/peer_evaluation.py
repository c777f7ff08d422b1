"""The peer of `evaluation`: the reference procedure in torch, one window at a time, the encoder twice for each.

The encoder is that of `transformers`, which knows 224 px alone: its positions are resized here.
"""

import argparse
import pathlib

import cv2
import numpy as np
import torch
from torch.nn import functional
import transformers

from benchmarks import rounds, voc_pictures

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATCH = 16


def main() -> None:
  """Serves `evaluation`."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  args = parser.parse_args()
  folder, device = args.folder, {'cpu': 'cpu', 'gpu': 'cuda'}[args.device]
  torch.manual_seed(0)
  model = transformers.GroupViTModel(transformers.GroupViTConfig()).eval()
  with torch.no_grad():  # an untrained assignment is a tie: make it decisive, as a trained one is
    for name, value in model.named_parameters():
      if 'group_token' in name or '.assign.q_proj.weight' in name or '.assign.k_proj.weight' in name:
        value.normal_(0, 0.15)
  np.savez(folder / 'weights.npz', **{name: value.numpy() for name, value in model.state_dict().items()})
  enlarged = enlarge(model).to(device)
  text = torch.from_numpy(voc_pictures.text_embeds()).to(device)
  label = lambda image: label_picture(enlarged, image, text, getattr(torch, args.dtype))
  counts = np.zeros((21, 21), np.int64)

  def evaluate(number: int) -> int:
    for index in range(number):
      image, truth = voc_pictures.picture(index)
      labels = label(image)
      cells = truth.ravel().astype(int) * 21 + labels.ravel()
      counts[:] += np.bincount(cells, minlength=21 * 21).reshape(21, 21)
    return number

  maps = {str(i): label(voc_pictures.picture(i)[0]) for i in range(4)}
  np.savez(folder / 'peer_maps.npz', **maps)
  rounds.serve(
    {'torch': torch.__version__, 'transformers': transformers.__version__, 'threads': torch.get_num_threads()},
    {'labels': evaluate},
  )


def enlarge(model: transformers.GroupViTModel) -> transformers.GroupViTModel:
  """The same model for windows of 448 px: positions resized bicubically."""
  config = transformers.GroupViTConfig()
  config.vision_config.image_size = voc_pictures.WINDOW
  enlarged = transformers.GroupViTModel(config).eval()
  state = model.state_dict()
  name = 'vision_model.embeddings.position_embeddings'
  side, want = 224 // _PATCH, voc_pictures.WINDOW // _PATCH
  grid = state[name].reshape(1, side, side, -1).permute(0, 3, 1, 2)
  grid = functional.interpolate(grid, (want, want), mode='bicubic', align_corners=False)
  state[name] = grid.permute(0, 2, 3, 1).reshape(1, want * want, -1)
  enlarged.load_state_dict(state)
  return enlarged


@torch.no_grad()
def label_picture(
  model: transformers.GroupViTModel, image: np.ndarray, text: torch.Tensor, dtype: torch.dtype
) -> np.ndarray:
  """Label map [H, W] of a picture uint8 [H, W, 3]."""
  side, stride = voc_pictures.WINDOW, voc_pictures.STRIDE
  scale = min(side / min(image.shape[:2]), 2048 / max(image.shape[:2]))
  rows, columns = (int(length * scale + 0.5) for length in image.shape[:2])
  place = text.device
  resized = torch.from_numpy(cv2.resize(image, (columns, rows))).to(place).permute(2, 0, 1)[None].float() / 255
  mean, std = (torch.tensor(values, device=place)[:, None, None] for values in (_MEAN, _STD))
  resized = (resized - mean) / std
  scores = torch.zeros(1, len(text) + 1, rows, columns, device=place)
  overlap = torch.zeros(1, 1, rows, columns, device=place)
  for top in _starts(rows, side, stride):
    for left in _starts(columns, side, stride):
      window = resized[:, :, top : top + side, left : left + side]
      scores[:, :, top : top + side, left : left + side] += _window_scores(model, window, text, dtype)
      overlap[:, :, top : top + side, left : left + side] += 1
  scores = functional.interpolate(scores / overlap, image.shape[:2], mode='bilinear', align_corners=False)
  return scores.argmax(dim=1)[0].cpu().numpy()


def _starts(length: int, side: int, stride: int) -> list[int]:
  count = -(-max(length - side, 0) // stride) + 1
  return [min(i * stride, max(length - side, 0)) for i in range(count)]


def _window_scores(
  model: transformers.GroupViTModel, window: torch.Tensor, text: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
  """Scores [1, 1 + C, h, w] of a window, the background first."""
  with torch.autocast(window.device.type, dtype, enabled=dtype != torch.float32):
    # Once for the pooled feature ...
    pooled = model.visual_projection(model.vision_model(window).pooler_output)
    # ... and once more for the assignments.
    out = model.vision_model(window, output_attentions=True)
    segments = model.visual_projection(out.last_hidden_state[0])
  pooled, segments = (functional.normalize(embeds.float(), dim=-1) for embeds in (pooled, segments))
  affinity = out.attentions[0][0].float().T
  for soft in out.attentions[1:]:
    affinity = affinity @ soft[0].float().T
  grid = affinity.T.reshape(1, -1, window.shape[2] // _PATCH, window.shape[3] // _PATCH)
  segment = functional.interpolate(grid, window.shape[2:], mode='bilinear', align_corners=False).argmax(dim=1)[0]
  temperature = model.logit_scale.exp().clamp(max=100)
  logits = temperature * segments @ text.T
  kept = (temperature * pooled @ text.T).softmax(dim=-1).topk(5, dim=-1).indices[0]
  filtered = torch.full_like(logits, -torch.inf)
  filtered[:, kept] = logits[:, kept]
  p = filtered.softmax(dim=-1) * logits.softmax(dim=-1)
  classes = p[segment].permute(2, 0, 1)[None]
  best = classes.max(dim=1, keepdim=True).values
  threshold = p.max().clamp(max=voc_pictures.THRESHOLD)
  return torch.cat([(best < threshold).float(), classes], dim=1)


if __name__ == '__main__':
  main()
