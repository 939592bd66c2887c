"""Instructions per weight: the loop that is counted, and the count that integers were made for."""

import subprocess

import pytest

pytest.importorskip("triton", reason="compiling needs Triton")

from headrace.bench.asked_process import module_command
from headrace.check.linear_instructions import longest_loop

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LDG.E R4, [R2] ;
        /*0040*/                   IDP.2A.LO.S16.U8 R5, R4, R6, R5 ;
        /*0050*/               @P1 BRA 0x30 ;
        /*0060*/                   BRA 0x60 ;
"""


def test_the_longest_loop_is_taken():
    assert [text.split()[0] for text in longest_loop(SASS)] == ["LDG.E", "IDP.2A.LO.S16.U8", "BRA"]
    assert longest_loop("") == []


@pytest.mark.slow
def test_int4_takes_no_more_than_planned():
    """At 80 % of an H200's copy bandwidth 4.7 could be issued; half of it leaves time to wait."""
    command, environment = module_command("headrace.check.linear_instructions")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([*command, "int4"], env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout.split()[2]) <= 2.5
    assert " 0 spilled" in done.stdout
