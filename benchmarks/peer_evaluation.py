"""The peer of the evaluation benchmark: the reference procedure in torch, one window at a time, each encoded twice.

The encoder is that of `transformers`, which knows 224 px alone: its positions are resized here.
"""

import argparse
import pathlib

import cv2
import numpy as np
import torch
from torch.nn import functional
import transformers

from benchmarks import evaluation, peer_side, processes

_PATCH, _SIDE, _STRIDE = 16, evaluation.WINDOW, evaluation.STRIDE


def main() -> None:
  """Serves rounds; leaves the weights in a folder for our side."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  args = parser.parse_args()
  model = peer_side.make_model(224).eval()
  with torch.no_grad():  # an untrained assignment is a tie: make it decisive, as a trained one is
    for name, value in model.named_parameters():
      if 'group_token' in name or '.assign.q_proj.weight' in name or '.assign.k_proj.weight' in name:
        value.normal_(0, 0.15)
  np.savez(args.folder / 'weights.npz', **{name: value.numpy() for name, value in model.state_dict().items()})
  enlarged, text = enlarge(model), torch.from_numpy(evaluation.class_embeds())
  label = lambda image: label_image(enlarged, image, text)
  counts = np.zeros((21, 21), np.int64)

  def evaluate(number: int) -> int:
    for index in range(number):
      image, truth = evaluation.draw_image(index)
      cells = truth.ravel().astype(int) * 21 + label(image).ravel()
      counts[:] += np.bincount(cells, minlength=21 * 21).reshape(21, 21)
    return number

  np.savez(args.folder / 'peer_maps.npz', **{str(i): label(evaluation.draw_image(i)[0]) for i in range(4)})
  versions = {'torch': torch.__version__, 'transformers': transformers.__version__}
  processes.serve(versions | {'threads': torch.get_num_threads()}, {'labels': evaluate})


def enlarge(model: transformers.GroupViTModel) -> transformers.GroupViTModel:
  """The same model for windows of 448 px: positions resized bicubically."""
  enlarged, state = peer_side.make_model(_SIDE).eval(), model.state_dict()
  name = 'vision_model.embeddings.position_embeddings'
  side, want = 224 // _PATCH, _SIDE // _PATCH
  grid = state[name].reshape(1, side, side, -1).permute(0, 3, 1, 2)
  grid = functional.interpolate(grid, (want, want), mode='bicubic', align_corners=False)
  state[name] = grid.permute(0, 2, 3, 1).reshape(1, want * want, -1)
  enlarged.load_state_dict(state)
  return enlarged


@torch.no_grad()
def label_image(model: transformers.GroupViTModel, image: np.ndarray, text: torch.Tensor) -> np.ndarray:
  """Label map [H, W] of an image uint8 [H, W, 3]."""
  scale = min(_SIDE / min(image.shape[:2]), 2048 / max(image.shape[:2]))
  rows, columns = (int(length * scale + 0.5) for length in image.shape[:2])
  resized = torch.from_numpy(cv2.resize(image, (columns, rows))).permute(2, 0, 1)[None].float() / 255
  mean, std = (torch.tensor(values)[:, None, None] for values in (peer_side.MEAN, peer_side.STD))
  resized = (resized - mean) / std
  scores = torch.zeros(1, len(text) + 1, rows, columns)
  overlap = torch.zeros(1, 1, rows, columns)
  for top in _starts(rows):
    for left in _starts(columns):
      part = (slice(None), slice(None), slice(top, top + _SIDE), slice(left, left + _SIDE))
      scores[part] += _window_scores(model, resized[part], text)
      overlap[part] += 1
  scores = functional.interpolate(scores / overlap, image.shape[:2], mode='bilinear', align_corners=False)
  return scores.argmax(dim=1)[0].numpy()


def _starts(length: int) -> list[int]:
  last = max(length - _SIDE, 0)
  return [min(i * _STRIDE, last) for i in range(-(-last // _STRIDE) + 1)]


def _window_scores(model: transformers.GroupViTModel, window: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
  """Scores [1, 1 + C, h, w] of a window, the background first."""
  # Once for the pooled feature ...
  pooled = model.visual_projection(model.vision_model(window).pooler_output)
  # ... and once more for the assignments.
  out = model.vision_model(window, output_attentions=True)
  segments = model.visual_projection(out.last_hidden_state[0])
  pooled, segments = (functional.normalize(embeds, dim=-1) for embeds in (pooled, segments))
  affinity = out.attentions[0][0].T
  for soft in out.attentions[1:]:
    affinity = affinity @ soft[0].T
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
  threshold = p.max().clamp(max=evaluation.THRESHOLD)
  return torch.cat([(best < threshold).float(), classes], dim=1)


if __name__ == '__main__':
  main()
