/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * How the code is written for the two verifiers. Without CAP_PERFMON (LBH_GUARDED) the kernel also follows what a CPU
 * may do in speculation: it follows a loop past its end and gives up, and it masks every index into a map's value
 * (sanitize_ptr_alu in kernel/bpf/verifier.c). With it, loops keep the code short, and indexes are left alone.
 */
#ifndef LBH_GUARD_H
#define LBH_GUARD_H

#ifdef LBH_GUARDED
#define LBH_LOOP _Pragma("unroll")
#else
#define LBH_LOOP _Pragma("clang loop unroll(disable)")
#endif

/*
 * Makes an index into a map's value a number that the verifier does not know: it takes only one mask for each
 * instruction. noise: whatever it does not know either.
 */
static __always_inline u32 hide(u32 index, u32 noise)
{
#ifdef LBH_GUARDED
	asm volatile("" : "+r"(noise));
	index ^= noise;
	asm volatile("" : "+r"(index));
	return index ^ noise;
#else
	return index;
#endif
}

#endif
