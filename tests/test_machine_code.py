"""Machine code taken apart: blocks, loops, kinds of instructions, in NVIDIA's disassembly and in AMD's assembly."""

from hlip_kernels.machine_code import fullest_turns, innermost_loops, parse


def test_loops_are_found_in_a_disassembly():
    """A loop in a loop, with a wait whose tries lie elsewhere, and padding at the end."""
    text = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""
    (loop,) = innermost_loops(parse(text), "product")
    assert [i.name.split(".")[0] for i in loop] == "HGMMA SYNCS BRA MUFU WARPGROUP BRA SYNCS BRA BRA".split()
    assert [i.kind for i in loop] == ["product", "", "", "exp2", "wait 0", "", "", "", ""]
    (outer,) = innermost_loops(parse(text), "spill")
    assert len(outer) == 11  # with that loop in it


def test_loops_are_found_in_amd_assembly():
    """A loop in a loop; directives, comments and labels of debuggers are no instructions."""
    text = """
	.text
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0      ; 8-byte Folded Reload
.LBB0_1:                                ; =>This Loop Header: Depth=1
	v_mov_b32_e32 v1, 0
.Ltmp0:
	.loc	1 50 3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=2
	v_mfma_f32_32x32x8_bf16_1k v[2:17], v[0:1], v[18:19], v[2:17]
	v_exp_f32_e32 v20, v21
	s_cbranch_scc1 .LBB0_4
; %bb.3:
	s_cbranch_vccnz .LBB0_2
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
	s_branch .LBB0_2
"""
    blocks = parse(text)
    (loop,) = innermost_loops(blocks, "exp2")
    assert [i.name for i in loop] == ["v_mfma_f32_32x32x8_bf16_1k", "v_exp_f32_e32", "s_cbranch_scc1", "s_cbranch_vccnz"]
    assert [i.targets for i in loop] == [[], [], [".LBB0_4"], [".LBB0_2"]]
    assert sum(len(block.instructions) for block in blocks) == 9


def test_code_without_loops():
    assert innermost_loops(parse("        /*0000*/                   EXIT ;"), "exp2") == []
    assert innermost_loops(parse(""), "product") == []


def test_a_turn_that_does_all_there_is_without_what_only_some_do():
    """Two products, of which one may be left out; a mask that may not be needed; a loop without products inside."""
    text = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   NOP ;
.L_x_1:
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   FSEL R4, R4, -INF, P2 ;
        /*0070*/                   FSEL R5, R5, -INF, P2 ;
.L_x_2:
        /*0080*/                   IADD3 R6, R6, 0x1, RZ ;
        /*0090*/               @P3 BRA `(.L_x_2) ;
        /*00a0*/               @P4 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00c0*/               @P4 BRA `(.L_x_3) ;
        /*00d0*/                   EXIT ;
"""
    assert fullest_turns(parse(text), lambda i: i.name.startswith("HMMA")) == [(2, 8), (1, 2)]
    masked = fullest_turns(parse(text), lambda i: 10 * i.name.startswith("HMMA") + i.name.startswith("FSEL"))
    assert masked == [(22, 10), (10, 2)]
    assert fullest_turns(parse(text), lambda i: i.name == "EXIT") == []
