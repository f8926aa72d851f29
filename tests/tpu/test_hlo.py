"""Reading a compiled program: what stands in its text, against what was written by hand."""
import math

import pytest

from mgjax.chips import chip_of
from mgjax.tpu import bundles, hlo, ops

V5E = chip_of("TPU v5 lite")

# A loop of four products, the second operand sliced out of a stack; a kernel whose notes break the
# line; an update in place.
# ruff: noqa: E501  (the lines of a compiler)
TEXT = '''HloModule jit_step, is_scheduled=true

%fused_product (p0: bf16[256,512], p1: bf16[4,512,128], p2: s32[]) -> bf16[256,128] {
  %p0 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,512,128]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,512,128}
  %w = bf16[512,128]{1,0} bitcast(%slice)
  ROOT %conv = bf16[256,128]{1,0} convolution(%p0, %w), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[256,512], bf16[4,512,128], bf16[256,128])) -> (s32[], bf16[256,512], bf16[4,512,128], bf16[256,128]) {
  %arg = (s32[], bf16[256,512]{1,0}, bf16[4,512,128]{2,1,0}, bf16[256,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %stack = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %product = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %stack, %i), kind=kOutput, calls=%fused_product, metadata={op_name="jit(step)/transpose(jvp())/checkpoint/rematted_computation/dot_general"}, backend_config={"window_config":{"estimated_cycles":"3000"}}
  %kernel = bf16[256,128]{1,0} custom-call(%product), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 1024}"
}}, backend_config={"custom_call_config":{"body":"xx"}}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[256,512]{1,0}, bf16[4,512,128]{2,1,0}, bf16[256,128]{1,0}) tuple(%next, %x, %stack, %kernel)
}, execution_thread="main"

%condition (arg.1: (s32[], bf16[256,512], bf16[4,512,128], bf16[256,128])) -> pred[] {
  %arg.1 = (s32[], bf16[256,512]{1,0}, bf16[4,512,128]{2,1,0}, bf16[256,128]{1,0}) parameter(0)
  %limit = s32[] constant(4)
  %at = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[256,512], b: bf16[4,512,128], c: bf16[256,128]) -> bf16[256,128] {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[256,128]{1,0} parameter(2)
  %begin = s32[] constant(0)
  %start = (s32[], bf16[256,512]{1,0}, bf16[4,512,128]{2,1,0}, bf16[256,128]{1,0}) tuple(%begin, %a, %b, %c)
  %loop = (s32[], bf16[256,512]{1,0}, bf16[4,512,128]{2,1,0}, bf16[256,128]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[256,128]{1,0} get-tuple-element(%loop), index=3
}
'''


@pytest.fixture(scope="module")
def module():
  return hlo.parse(TEXT)


def found(module, name):
  return next((c, of[name]) for c, of in module.computations.items() if name in of)


def test_loops_run_as_often_as_they_say(module):
  assert module.trip_count(found(module, "loop")[1]) == 4


def test_a_broken_line_is_one_instruction(module):
  _, kernel = found(module, "kernel")
  assert ops.is_kernel(kernel) and kernel.operands == ("product",)
  assert "next" in module.computations["body"]  # what follows it is still there


def test_what_a_product_costs(module):
  computation, product = found(module, "product")
  assert product.cycles == 3000 and product.arrays[0].in_hbm is False
  price = ops.cost(module, computation, product, V5E)
  assert price.flops == 2 * 256 * 512 * 128
  # One slice of the stack is read, and the index; the result stays on the chip.
  assert price.bytes == 2 * (256 * 512 + 512 * 128) + 4
  # The longer of the bytes and of the operations at an assumed rate, not what the compiler says.
  assert price.seconds == pytest.approx(price.bytes / V5E.hbm_bandwidth)
  assert price.compiler == pytest.approx(3000 / 1.5e9)


def test_of_what_is_cut_out_or_written_into_only_that_part_is_moved():
  text = TEXT.replace("  %one = s32[] constant(1)\n", """  %cache = bf16[8,1024,128]{2,1,0} parameter(1)
  %at = s32[8,1]{1,0} parameter(2)
  %new = bf16[8,128]{1,0} parameter(3)
  %part = bf16[1,1024,128]{2,1,0} slice(%cache), slice={[0:1],[0:1024],[0:128]}
  %picked = bf16[8,128]{1,0} gather(%cache, %at), offset_dims={1}
  %written = bf16[8,1024,128]{2,1,0} scatter(%cache, %at, %new), to_apply=%add
  %ahead = (bf16[8,1024,128]{2,1,0:S(1)}, bf16[8,1024,128]{2,1,0}, u32[]) copy-start(%cache)
  %cut = ((bf16[8,1024,128]{2,1,0}), bf16[1,1024,128]{2,1,0:S(1)}, u32[]) slice-start(%cache)
  %one = s32[] constant(1)
""")
  module = hlo.parse(text)
  moved = lambda name: ops.hbm_bytes(module, *found(module, name))
  assert moved("part") == 2 * 2 * 1024 * 128
  assert moved("picked") == moved("written") == 2 * 2 * 8 * 128
  assert moved("ahead") == 8 * moved("cut") == 2 * 8 * 1024 * 128


NESTED = """%same (p: bf16[512,128]) -> bf16[512,128] {
  %p = bf16[512,128]{1,0} parameter(0)
  ROOT %b = bf16[512,128]{1,0} bitcast(%p)
}

%tiles (q: s8[8,1024,128]) -> s8[8,1024,128] {
  %q = s8[8,1024,128]{2,1,0} parameter(0)
  ROOT %copied = s8[8,1024,128]{2,1,0} copy(%q)
}

%product_of (r: bf16[512,128], x: bf16[8,512]) -> bf16[8,128] {
  %r = bf16[512,128]{1,0} parameter(0)
  %x = bf16[8,512]{1,0} parameter(1)
  %through = bf16[512,128]{1,0} fusion(%r), kind=kLoop, calls=%same
  ROOT %conv = bf16[8,128]{1,0} convolution(%x, %through), dim_labels=bf_io->bf
}

%part_of (s: s8[8,1024,128], at: s32[]) -> s8[8,128,128] {
  %s = s8[8,1024,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %retiled = s8[8,1024,128]{2,1,0} fusion(%s), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  ROOT %part = s8[8,128,128]{2,1,0} dynamic-slice(%retiled, %at, %at, %at), dynamic_slice_sizes={8,128,128}
}

ENTRY %main (w: bf16[512,128], y: bf16[8,512], cache: s8[8,1024,128], n: s32[]) -> bf16[8,128] {
  %w = bf16[512,128]{1,0} parameter(0)
  %y = bf16[8,512]{1,0:S(1)} parameter(1)
  %cache = s8[8,1024,128]{2,1,0} parameter(2)
  %n = s32[] parameter(3)
  %block = s8[8,128,128]{2,1,0:S(1)} fusion(%cache, %n), kind=kLoop, calls=%part_of
  ROOT %out = bf16[8,128]{1,0:S(1)} fusion(%w, %y), kind=kOutput, calls=%product_of
}
"""


def test_what_fusions_within_a_fusion_read():
  module = hlo.parse(NESTED)
  moved = lambda name: ops.hbm_bytes(module, *found(module, name))
  assert moved("out") == 2 * 512 * 128          # through a fusion that only renames it
  assert moved("block") - 4 == 8 * 128 * 128    # and the number of the slot: not all of the cache


def test_what_is_no_product_takes_as_long_as_the_compiler_says(module):
  computation, add = found(module, "next")
  added = hlo.Instruction(add.name, add.arrays, add.opcode, add.operands, add.argument,
                          'backend_config={"window_config":{"estimated_cycles":"3000"}}')
  assert ops.cost(module, computation, added, V5E).seconds == pytest.approx(3000 / 1.5e9)


@pytest.mark.parametrize("window, sizes, pairs", [
    ({"size": 3, "pad": "1_1"}, (8, 3, 8), 22),                   # edges see two taps of three
    ({"stride": 2}, (8, 2, 4), 8),
    ({"pad": "3_3", "rhs_dilate": 1, "lhs_dilate": 4}, (4, 4, 16), 16),  # one tap hits: a batch
])
def test_taps_outside_count_nothing(window, sizes, pairs):
  size, taps, outputs = sizes
  got = ops._pairs(size, taps, outputs, {k: str(v) for k, v in window.items()})
  stride, spread = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
  low = int(str(window.get("pad", "0_0")).split("_")[0])
  counted = sum(1 for o in range(outputs) for t in range(taps)
                if 0 <= (at := o * stride - low + t) <= (size - 1) * spread and at % spread == 0)
  assert got == counted == pairs


def test_kernels_of_attention_count_the_blocks_of_their_mask():
  line = ('splash_mha_fwd.1 = bf16[32,2048,128]{2,1,0} custom-call(%table, %q, %k), '
          'custom_call_target="tpu_custom_call"')
  text = TEXT.replace("  %one = s32[] constant(1)\n", f'''  %table = s8[1,2,2]{{2,1,0}} constant({{}})
  %q = bf16[32,2048,128]{{2,1,0}} parameter(1)
  %k = bf16[8,2048,128]{{2,1,0}} parameter(2)
  %{line}
  %one = s32[] constant(1)
''')
  module = hlo.parse(text)
  computation, kernel = found(module, "splash_mha_fwd.1")
  whole = 2 * 2 * 32 * 2048**2 * 128
  got = ops.op_flops(module, computation, kernel)
  assert got == {ops.ATTENTION_RATE: whole * 3 / 4}  # three of four blocks


def test_short_attention_counts_all_queries_with_all_keys():
  text = TEXT.replace("  %one = s32[] constant(1)\n", '''  %q = bf16[2,4096,640]{2,1,0} parameter(1)
  %k = bf16[2,77,640]{2,1,0} parameter(2)
  %v = bf16[2,77,640]{2,1,0} parameter(3)
  %short_attention.7 = bf16[2,4096,640]{2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"
  %one = s32[] constant(1)
''')
  module = hlo.parse(text)
  got = ops.op_flops(module, *found(module, "short_attention.7"))
  assert got == {ops.ATTENTION_RATE: 2 * 2 * 2 * 4096 * 77 * 640}


@pytest.mark.parametrize("line, products", [
    ("%mine_forward.1 = f32[2,24,24,48]{3,2,1,0} custom-call(%q, %a, %b, %m)", 2),
    ("%mine_backward.1 = (f32[2,24,24,48]{3,2,1,0}) custom-call(%q, %q, %a, %b, %m)", 3),
    ("%mine_backward.1 = (f32[2,24,24,48]{3,2,1,0}, bf16[2,192,192,16]{3,2,1,0}, "
     "bf16[2,96,96,32]{3,2,1,0}) custom-call(%q, %q, %a, %b, %m)", 6)])
def test_mining_counts_each_value_of_the_maps(line, products):
  text = TEXT.replace("  %one = s32[] constant(1)\n", f'''  %q = bf16[2,24,24,48]{{3,2,1,0}} parameter(1)
  %a = bf16[2,192,192,16]{{3,2,1,0}} parameter(2)
  %b = bf16[2,96,96,32]{{3,2,1,0}} parameter(3)
  %m = bf16[96,192]{{1,0}} parameter(4)
  {line}, custom_call_target="tpu_custom_call"
  %one = s32[] constant(1)
''')
  module = hlo.parse(text)
  got = ops.cost(module, *found(module, line[1:].split(" ")[0]), V5E)
  assert got.flops == got.kernel_flops == 2 * products * (2 * 192**2 * 16 + 2 * 96**2 * 32)
  registers = 2 * 192**2 / 8 + 2 * 96**2 / 8
  assert got.seconds == {2: 10, 3: 12, 6: 23}[products] * registers / V5E.clock


def test_depthwise_kernels_cost_what_their_schedule_says():
  text = TEXT.replace("  %one = s32[] constant(1)\n", '''  %m = bf16[2,24,20,192]{3,2,1,0} parameter(1)
  %taps = f32[2,49,128]{2,1,0} parameter(2)
  %depthwise_norm.7 = bf16[2,24,20,192]{3,2,1,0} custom-call(%m, %m, %m, %taps), custom_call_target="tpu_custom_call"
  %one = s32[] constant(1)
''')
  module = hlo.parse(text)
  got = ops.cost(module, *found(module, "depthwise_norm.7"), V5E)
  assert got.flops == got.kernel_flops == 2 * 49 * 2 * 24 * 20 * 192
  assert got.bytes == 2 * 2 * 2 * 24 * 20 * 192 + 4 * 2 * 49 * 128  # what is read thrice, once
  assert got.seconds == 39 * 2 * 24 * 3 * 2 / V5E.clock
  # A collective that goes on beside it makes a fusion of it.
  inside = text.replace("%depthwise_norm.7 = bf16[2,24,20,192]{3,2,1,0} custom-call(%m, %m, %m, "
                        '%taps), custom_call_target="tpu_custom_call"',
                        "%depthwise_norm.8 = bf16[2,24,20,192]{3,2,1,0} fusion(%m, %taps), "
                        "kind=kCustom, calls=%both").replace("\nENTRY", """
%both (p: bf16[2,24,20,192], t: f32[2,49,128]) -> bf16[2,24,20,192] {
  %p = bf16[2,24,20,192]{3,2,1,0} parameter(0)
  %t = f32[2,49,128]{2,1,0} parameter(1)
  ROOT %depthwise_norm.7 = bf16[2,24,20,192]{3,2,1,0} custom-call(%p, %p, %p, %t), custom_call_target="tpu_custom_call"
}

ENTRY""", 1)
  module = hlo.parse(inside)
  assert ops.cost(module, *found(module, "depthwise_norm.8"), V5E).seconds == got.seconds


def test_bundles_are_multiplied_by_the_runs_of_their_loops():
  text = """
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sphi %s0, %s2 /* iteration index, stage = 1 */ } /* Start region 7 :: Start region 3 */
   0x2 LB: >> { %s3 = sadd.s32 1, %s3 } /* Start region 5 */
   0x3   : >> { %p4_p1 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */ }
   0x4   : >> { %8 = sbr.rel (!%p4_p1) target = $region5 }
   0x5   :  {}
   0x6   : > { %p9_p0 = scmp.ge.s32.totalorder (%p4_p1), %s2, 6 /* loop exit test */ }
   0x7   : > { %9 = sbr.rel (!%p9_p0) target = $region7 }
   0x8   :  { %10 = vsyncpa 1 }
"""
  assert bundles.loops(text) == [bundles.Loop(0, 3, 1), bundles.Loop(1, 3, 4),
                                 bundles.Loop(2, 3, 40)]
  assert bundles.cycles(text) == 3 + 3 * 4 + 3 * 40
  with pytest.raises(ValueError, match="no trips for the loop at"):
    bundles.loops(text.replace("region5", "region6"))


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("nothing")


def test_sizes_of_arrays():
  assert hlo.Array("bf16", (3, 5), True).bytes == 30
  assert math.isclose(hlo.Array("s4", (4,), True).bytes, 2)
