"""Slices by name, and what does not exist."""
import pytest

from mgjax.config import ConfigError
from mgjax.sharding import fit_mesh
from mgjax.tpu.slices import parse_slice


@pytest.mark.parametrize("text, shape, chips, name", [
    ("v5e:8x8", (8, 8), 64, "v5e-64"), ("v5e-64", (8, 8), 64, "v5e-64"),
    ("v5p-128", (4, 4, 4), 64, "v5p-128"),   # its number counts cores
    ("v4:2x2x1", (2, 2, 1), 4, "v4-8"), ("v6e-256", (16, 16), 256, "v6e-256"),
    ("v5p:4x4x12", (4, 4, 12), 192, "v5p:4x4x12")])
def test_names(text, shape, chips, name):
  chosen = parse_slice(text)
  assert (chosen.shape, chosen.chips, chosen.name) == (shape, chips, name)


def test_several_slices():
  chosen = parse_slice("v5e-16", 4)
  assert chosen.chips == 64 and chosen.name == "4 x v5e-16"


@pytest.mark.parametrize("text, said", [
    ("v5e-63", "v5e-64"), ("v9:2x2", "v4, v5e, v5p, v6e"), ("v5e", "generation"),
    ("v5p:4x4", "v5p-128"), ("8x8", "generation")])
def test_what_does_not_exist_is_said_with_what_does(text, said):
  with pytest.raises(ConfigError, match=said):
    parse_slice(text)


@pytest.mark.parametrize("text, wraps", [
    ("v5e:8x8", (False, False)), ("v5e:8x16", (False, True)), ("v5e:16x16", (True, True)),
    ("v5p:4x4x4", (True,) * 3), ("v5p:2x4x4", (False,) * 3)])
def test_links_that_close_to_rings(text, wraps):
  chosen = parse_slice(text)
  assert tuple(map(chosen.wraps, range(len(chosen.shape)))) == wraps


@pytest.mark.parametrize("sizes, devices, rows, mesh", [
    ((1, -1, -1, 1), 64, [32], (1, 32, 2, 1)), ((1, -1, -1, 1), 8, [32], (1, 8, 1, 1)),
    ((1, -1, -1, 1), 64, [64, 32], (1, 32, 2, 1)), ((2, -1, -1, 1), 64, [64], (2, 32, 1, 1)),
    ((1, -1, 4, 1), 64, [32], (1, -1, 4, 1)), ((1, 8, -1, 1), 64, [32], (1, 8, -1, 1)),
    ((1, -1, -1, 8), 64, [32], (1, 4, 2, 8)), ((3, -1, -1, 1), 64, [32], (3, -1, 1, 1))])
def test_the_mesh_follows_the_rows(sizes, devices, rows, mesh):
  assert fit_mesh(sizes, devices, rows) == mesh
