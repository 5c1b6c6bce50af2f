/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Follows bpf/lb_hop.c in one file: its programs on packets of which each is another. BPF_PROG_TEST_RUN runs a program
 * on the same packet many times, so the packet itself is made to be the next one before each run.
 */

/* Numerical Recipes' generator, of full period: what comes in and what leaves goes through the same numbers. */
static __always_inline u32 bench_next(u32 isn)
{
	return isn * 1664525u + 1013904223u;
}

/* Makes a TCP segment behind an Ethernet and a plain IPv4 header the next one's. */
static __always_inline void bench_turn(struct __sk_buff *skb, bool answer)
{
	u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct tcphdr *tcp = (void *)(data + sizeof(struct ethhdr) + sizeof(struct iphdr));

	if ((void *)(tcp + 1) > (void *)end)
		return;
	if (answer)
		tcp->ack_seq = bpf_htonl(bench_next(bpf_ntohl(tcp->ack_seq) - 1) + 1);
	else
		tcp->seq = bpf_htonl(bench_next(bpf_ntohl(tcp->seq)));
}

int bench_syn(struct __sk_buff *skb)
{
	bench_turn(skb, false);
	return TC_ACT_UNSPEC;
}

int bench_answer(struct __sk_buff *skb)
{
	bench_turn(skb, true);
	return TC_ACT_UNSPEC;
}

int bench_syn_in(struct __sk_buff *skb)
{
	bench_turn(skb, false);
	return watch(lbh_tc_context(skb), true, true);
}

int bench_syn_out(struct __sk_buff *skb)
{
	bench_turn(skb, false);
	return watch(lbh_tc_context(skb), true, false);
}

int bench_answer_out(struct __sk_buff *skb)
{
	bench_turn(skb, true);
	return watch(lbh_tc_context(skb), true, false);
}
