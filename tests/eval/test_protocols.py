"""Protocols: what their names stand for, and what is refused."""

import dataclasses
import json

import pytest

from groupvit_jax.eval import protocols
from tests.runs import run_command


def test_groupvit_is_the_published_procedure():
  assert protocols.GROUPVIT.to_json() == {
    'name': 'groupvit',
    'resize': 'short_side',
    'short_side': 448,
    'max_long_side': 2048,
    'antialias': False,
    'window': 448,
    'stride': 224,
    'class_filter': 5,
    'double_softmax': True,
    'final_softmax': True,
    'threshold': None,
    'threshold_mode': 'window',
    'refine': None,
    'refine_iterations': 10,
    'refine_dilations': (1, 2, 4, 8, 12, 24),
    'templates': 'simple',
    'class_names': 'groupvit',
    'changed': [],
  }


def test_tcl_and_plain_differ_where_they_should():
  tcl, plain = protocols.TCL.to_json(), protocols.PLAIN.to_json()
  assert (tcl['threshold'], tcl['class_names'], tcl['window']) == (0.5, 'benchmark', 448)
  assert plain['class_filter'] is None and not plain['double_softmax']
  assert plain['threshold_mode'] == 'global'
  assert protocols.TCL_PAMR.to_json() == tcl | {'name': 'tcl+pamr', 'refine': 'pamr'}
  assert tcl['final_softmax'] and not plain['final_softmax']


def test_native_fits_the_models_own_pictures():
  native = protocols.native_protocol((64, 96))
  assert (native.short_side, native.window, native.stride) == (64, 64, 32)
  assert native.max_long_side == 256 and native.threshold is None and native.antialias
  assert native.class_filter == protocols.GROUPVIT.class_filter


def test_shifted_is_a_square_in_four_windows_half_a_patch_apart():
  shifted = protocols.shifted_protocol((64, 64), 8)
  assert (shifted.resize, shifted.short_side, shifted.window, shifted.stride) == ('square', 68, 64, 4)
  assert shifted.max_windows == 4
  assert protocols.shifted_protocol((224, 224), 16).short_side == 232
  assert protocols.shifted_protocol((16, 16), 1).stride == 1
  refined = protocols.find_protocol('shifted+pamr', (64, 64), 8)
  assert (refined.refinement, refined.changed) == (protocols.Pamr(2, (2, 4)), ())
  assert (
    dataclasses.replace(
      refined, name='shifted', refine=None, refine_iterations=10, refine_dilations=shifted.refine_dilations
    )
    == shifted
  )


def test_overrides_are_named_in_the_result():
  protocol = protocols.override(protocols.GROUPVIT, {'stride': 448, 'class_filter': None})
  found = json.loads(json.dumps(protocol.to_json()))
  assert found['name'] == 'groupvit' and found['stride'] == 448
  assert found['changed'] == ['stride', 'class_filter']
  assert protocol.title == 'groupvit with stride=448, class_filter=None'
  same = protocols.override(protocols.native_protocol((64, 64)), {'stride': 32, 'antialias': False})
  assert same.title == 'native with antialias=False'  # 32 is what it was


def test_every_part_can_be_changed_on_the_command_line():
  texts = dict(
    resize='square',
    short_side='224',
    max_long_side='1024',
    antialias='true',
    window='224',
    stride='112',
    class_filter='none',
    double_softmax='False',
    final_softmax='false',
    threshold='0.9',
    threshold_mode='global',
    refine='pamr',
    refine_iterations='3',
    refine_dilations='1,2',
    templates='full',
    class_names='benchmark',
  )
  found = protocols.parse_protocol('groupvit', (32, 32), 8, texts).to_json()
  assert found['changed'] == list(texts) == list(protocols.PARAMETERS)
  assert set(protocols.PARAMETERS) == {f.name for f in dataclasses.fields(protocols.Protocol)} - {'name', 'changed'}
  values = ['square', 224, 1024, True, 224, 112, None, False, False, 0.9, 'global', 'pamr', 3, (1, 2), 'full']
  assert [found[key] for key in texts] == [*values, 'benchmark']
  said = run_command('eval.py', '--help').stdout
  flags = ['class_names' if key == 'class_names' else f'protocol.{key}' for key in (*texts, 'threshold')]
  assert all(f'--{flag}:' in said for flag in flags) and '--protocol:' in said


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'strides': 2}, "a protocol has no 'strides'; it has resize"),
    ({'name': 'mine'}, "no 'name'"),
    ({'stride': 449}, 'stride=449 leaves gaps between windows of 448 px'),
    ({'stride': 0}, 'stride=0: use a whole number from 1 up'),
    ({'window': 448.0}, 'window=448.0: use a whole number'),
    ({'class_filter': 0}, 'class_filter=0'),
    ({'threshold': 1.5}, 'threshold=1.5: use a number from 0 to 1'),
    ({'threshold': True}, 'threshold=True'),
    ({'threshold_mode': 'both'}, "threshold_mode='both': use 'window' or 'global'"),
    ({'class_names': None}, 'class_names=None: name a set'),
    ({'resize': 'long_side'}, "resize='long_side': use 'short_side' or 'square'"),
    ({'refine': 'crf'}, "refine='crf': use None or 'pamr'"),
    ({'refine_dilations': 4}, 'refine_dilations=4: use whole numbers, as in 1,2,4'),
    ({'refine_dilations': (1, 0)}, 'refine_dilations=0: use a whole number from 1 up'),
    ({'double_softmax': 1}, 'double_softmax=1: use True or False'),
    ({'max_long_side': 400}, 'max_long_side=400 is less than short_side=448'),
    ({'short_side': 224}, 'short_side=224 is less than window=448: every image would be a window of its own size'),
    ({'templates': 'none'}, "no template set 'none'; the known sets are full"),
    ({'templates': 80}, "no template set '80'"),
  ],
)
def test_bad_overrides_are_refused_in_one_line(changes, message):
  with pytest.raises(ValueError) as error:
    protocols.override(protocols.GROUPVIT, changes)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_unknown_protocol():
  assert protocols.find_protocol('tcl', (64, 64), 8) is protocols.TCL
  assert protocols.find_protocol('native', (64, 96), 8) == protocols.native_protocol((64, 96))
  assert protocols.find_protocol('shifted', (64, 96), 8) == protocols.shifted_protocol((64, 96), 8)
  with pytest.raises(
    ValueError, match="'voc'; choose one of native, shifted, shifted\\+pamr, groupvit, tcl, tcl\\+pamr, tcl-336, "
  ):
    protocols.find_protocol('voc', (64, 64), 8)


def test_most_windows():
  assert protocols.GROUPVIT.max_windows == 9
  square = dataclasses.replace(protocols.GROUPVIT, short_side=896, max_long_side=896)
  assert square.max_windows == 9
  assert protocols.WHOLE.max_windows == 1 and protocols.TCL_336.max_windows == 2 * 13
