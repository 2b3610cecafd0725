"""Figures that do not depend on how busy a machine is: instructions, vector loops, launches, bytes.

callgrind runs watched.py under valgrind; disassembly reads the AVX-512 loops; gpu steps on the tests' simulated GPU.
"""
