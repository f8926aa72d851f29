"""What the compiler is told, for each platform.  The one place that does."""
from __future__ import annotations

from jax.sharding import Mesh

# Names and meanings: docs/tpu.md.
_OPTIONS = {
    "tpu": {
        # FSDP gathers each weight as a whole, ahead of its product; cutting products into a ring of
        # small ones (collective matmul) costs more than it hides at these sizes.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # All-gathers and reduce-scatters go on beside products (v5e does the first by default).
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_enable_async_all_gather": "true",
        # Over a whole v5p slice gathers would be sums of what is zero elsewhere: twice the bytes.
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
        "xla_enable_async_reduce_scatter_fusion": "true",
        # Gradients are scattered, not summed everywhere and cut, for more of their layouts.
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": "true",
    },
}

# A core's memory that one operation may take, in KiB.  The default is 16 MiB: products that gather
# beside themselves take 16.06 in the backward pass of the 2B preset, our kernels up to 20.  A v4
# has no more than 16.
_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
_LITTLE_MEMORY = ("TPU v4",)  # device kinds

# Beside these, for the UNet's small maps: XLA would turn the height of few pictures into more
# pictures, copying every map there and back.  (Of the autoencoder's large maps nothing is known but
# that they compile much longer so.)
_SAMPLING = {
    "tpu": {
        "xla_tpu_run_space_to_batch": "false",
        "xla_tpu_run_space_to_batch_on_new_platforms": "false",
    },
}


def options_of(platform: str) -> dict[str, str]:
  """For `jax.jit(compiler_options=...)`."""
  return _OPTIONS.get(platform, {})


def sampling_options(platform: str) -> dict[str, str]:
  """The same for the loop that takes noise out of latents."""
  return options_of(platform) | _SAMPLING.get(platform, {})


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """For `lowered.compile(compiler_options=...)`, by the mesh's devices."""
  device = mesh.devices.flat[0]
  more = _MEMORY if device.platform == "tpu" and device.device_kind not in _LITTLE_MEMORY else {}
  return options_of(device.platform) | more
