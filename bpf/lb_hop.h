/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The contract between the programs and the agent: every map key, map value and ring record, every enum and
 * every histogram bound. otel_lb_hop/core/layout.py mirrors it once; tests/unit/test_layout.py compiles this
 * file with the host's compiler and compares offsets, sizes and numbers.
 *
 * Addresses are 16 bytes in network order, IPv4 mapped (RFC 4291, 2.5.5.2). Ports are in network order, as in
 * struct tcphdr. Times are CLOCK_MONOTONIC nanoseconds (bpf_ktime_get_ns). Padding is explicit and zero.
 */
#ifndef LB_HOP_H
#define LB_HOP_H

/* Raised with every change of a layout, an enum or a bound below. */
#define LBH_LAYOUT_VERSION 4

struct lbh_address {
	u32 words[4];
};

/* vip_ports: which destinations are VIP ports. */
struct lbh_vip_key {
	struct lbh_address address;
	u16 port;
	u8 transport; /* IANA protocol number */
	u8 pad;
};

/* A connection that is never translated is counted under the reason that held when it began. */
enum lbh_unforwarded {
	LBH_DROPPED,
	LBH_NO_ENDPOINTS,
	LBH_NO_LOCAL_ENDPOINTS,
	LBH_UNFORWARDED_REASONS,
};

struct lbh_vip {
	u32 vip_id;	/* row of vip_stats, and of hop_stats for a backend that the topology does not know */
	u8 unforwarded; /* enum lbh_unforwarded */
	u8 pad[3];
};

/* backends: which row of hop_stats a translation to this address belongs to (value: u32 hop_id). */
struct lbh_backend_key {
	u32 vip_id;
	struct lbh_address address;
	u16 port;
	u16 pad;
};

enum lbh_origin {
	LBH_INTERNAL,
	LBH_EXTERNAL,
	LBH_ORIGINS,
};

/*
 * places: where an address is, by its longest prefix (value: u32, enum lbh_place; no prefix: outside). Conntrack
 * names no interface: for what it tells, the place of the client's address is the origin.
 */
struct lbh_prefix {
	u32 bits; /* of the 128; an IPv4 prefix has 96 more than it is written with */
	struct lbh_address address;
};

enum lbh_place {
	LBH_OUTSIDE,
	LBH_INSIDE,
	LBH_THIS_NODE,
};

/*
 * Upper bounds of the histogram buckets in nanoseconds, inclusive, as OTLP's explicit bounds are; one more
 * bucket takes what is above the last.
 */
#define LBH_BOUNDS(X)                                                                                                  \
	X(1000)                                                                                                        \
	X(2500)                                                                                                        \
	X(5000)                                                                                                        \
	X(10000)                                                                                                       \
	X(25000)                                                                                                       \
	X(50000)                                                                                                       \
	X(100000)                                                                                                      \
	X(250000)                                                                                                      \
	X(500000)                                                                                                      \
	X(1000000)                                                                                                     \
	X(2500000)                                                                                                     \
	X(5000000)                                                                                                     \
	X(10000000)                                                                                                    \
	X(25000000)                                                                                                    \
	X(50000000)                                                                                                    \
	X(100000000)                                                                                                   \
	X(250000000)                                                                                                   \
	X(500000000)                                                                                                   \
	X(1000000000)                                                                                                  \
	X(2500000000)                                                                                                  \
	X(5000000000)
#define LBH_FIRST_BOUND_NS 1000
#define LBH_BUCKETS 22

struct lbh_histogram {
	u64 sum_ns;
	u64 buckets[LBH_BUCKETS];
};

/*
 * vip_stats, per CPU: one row for each VIP port. Σ connections = Σ hop_stats.forwarded over the VIP port's rows
 * + Σ unforwarded + those whose SYN has no verdict yet (of UDP and SCTP there are none: they are told at their
 * verdict).
 */
struct lbh_vip_stats {
	u64 connections[LBH_ORIGINS];
	u64 unforwarded[LBH_ORIGINS][LBH_UNFORWARDED_REASONS];
	u64 retransmits;
};

/*
 * hop_stats, per CPU: one row for each (VIP port, hop class, backend node). Σ forwarded = answered + refused +
 * timeout + reply_unseen + evicted + translated + those whose handshake has no verdict yet.
 */
struct lbh_hop_stats {
	u64 forwarded[LBH_ORIGINS];
	u64 answered;
	u64 refused;
	u64 timeout;	  /* no SYN-ACK, and the client sent its SYN again */
	u64 reply_unseen; /* no SYN-ACK here, but no second SYN either: the answer took another way */
	u64 evicted;	  /* out of the handshake table before its verdict: room was needed, or the agent ended */
	struct lbh_histogram forward;
	struct lbh_histogram handshake;
	u64 translated; /* told by conntrack, which does not tell of an answer */
};

/*
 * Handshake table: LBH_TABLE_BUCKETS (a power of two, set at compile time) buckets of LBH_WAYS slots. A slot's
 * tag is its ISN (32 bits), state (3) and the time of its first SYN in ticks of 2^23 ns (29); every change of
 * state is one compare-and-swap of the whole tag, so each verdict is reached exactly once on any number of CPUs.
 * The tags of a bucket are one cache line in a map of their own, small enough to stay in the cache, because every
 * SYN that leaves the node is looked up there; slots are touched only by what belongs to a VIP port.
 */
#define LBH_WAYS 8
#define LBH_TICK_SHIFT 23
#define LBH_TICK_MASK 0x1fffffffu

enum lbh_state {
	LBH_FREE,
	LBH_BUSY,	/* being filled */
	LBH_SEEN,	/* SYN to a VIP port came in */
	LBH_FORWARDED,	/* the translated SYN went out */
	LBH_UNANSWERED, /* verdict without an answer; kept because the client may send its SYN again */
	LBH_SETTLED,	/* answered or refused; first to make room */
};

struct lbh_handshake {
	u64 syn_ns;	 /* first SYN */
	u64 last_syn_ns; /* latest SYN */
	struct lbh_address client;
	struct lbh_address vip;
	u16 client_port;
	u16 vip_port;
	u32 vip_id;
	u32 in_ifindex;
	u16 retransmits;
	u8 origin;	/* enum lbh_origin */
	u8 unforwarded; /* enum lbh_unforwarded */
	u64 forward_ns; /* the translated SYN left; 0: not seen */
	struct lbh_address snat;
	struct lbh_address backend;
	u16 snat_port;
	u16 backend_port;
	u32 hop_id;
	u8 xdp; /* 1: the first SYN was seen by XDP, 0: by tc */
	u8 pad[15];
};

struct lbh_tags {
	u64 ways[LBH_WAYS];
};

/*
 * In front of the table: the time (in ticks, 16 bits) of the latest SYN by a part of its ISN's hash. 16 KiB, which the
 * kernel takes from its directly mapped memory.
 */
#define LBH_RECENT_CELLS 8192
struct lbh_recent {
	u16 ticks[LBH_RECENT_CELLS];
};
/* A translated SYN leaves within microseconds of the SYN that came in; this is a second. */
#define LBH_TRANSLATION_TICKS 128
/* An answer that comes later than this (16 s), long after the verdict, is not even counted as late. */
#define LBH_ANSWER_TICKS 2048

enum lbh_verdict {
	LBH_VERDICT_ANSWERED,
	LBH_VERDICT_REFUSED,
	LBH_VERDICT_TIMEOUT,
	LBH_VERDICT_REPLY_UNSEEN,
	LBH_VERDICT_TRANSLATED,	 /* told by conntrack: whether it was answered is not known here */
	LBH_VERDICT_UNFORWARDED, /* + enum lbh_unforwarded */
};

/*
 * What a connection has in common with all others of its kind. It lies together because its bytes are the key under
 * which the agent finds again what it has worked out for them once.
 */
struct lbh_kind {
	struct lbh_address backend; /* with its port zero unless translated */
	u16 backend_port;
	u8 verdict; /* enum lbh_verdict */
	u8 origin;  /* enum lbh_origin */
	u32 vip_id;
	u32 hop_id;
	u32 in_ifindex;
	u8 translated; /* 1: where to is known, by a translated SYN or by conntrack */
	u8 pad[3];
};

/*
 * One ring record: a connection at its verdict. What is told by conntrack and not by packets has forward_ns 0, end_ns =
 * syn_ns (when it was told), and no interface (0), but for a datagram that found no endpoint.
 */
struct lbh_record {
	u64 syn_ns;
	u64 forward_ns;	 /* when the translated SYN left; 0: not seen */
	u64 end_ns;	 /* SYN-ACK or RST out; else the time of the verdict */
	u64 trace_id[2]; /* in network order, as it is sent */
	struct lbh_address client;
	struct lbh_address snat; /* with its port zero unless translated */
	u16 client_port;	 /* these two in host order: they are told as numbers */
	u16 snat_port;
	u16 retransmits;
	u8 pad[2];
	struct lbh_kind kind;
	u8 pad2[4];
};

/* uplinks: the interfaces that lead out of the cluster; a SYN that came in by one is external. Ended by a zero. */
#define LBH_MAX_UPLINKS 64
struct lbh_uplinks {
	u32 ifindexes[LBH_MAX_UPLINKS];
};

/* settings: written by the agent before anything is attached, and at its end, when every verdict is due at once. */
struct lbh_settings {
	u64 verdict_after_ns;	/* a handshake without an answer gets its verdict at this age */
	u64 reject_below;	/* records of good handshakes: kept if the trace id's low 56 bits reach this */
	u64 record_interval_ns; /* 10^9 / records per second; 0: no record at all */
	u64 record_burst_ns;	/* how far records may run ahead of that rate; those of failures twice as far */
	u64 own_calls;		/* 1: count the TCP calls that this node itself makes, which conntrack tells of */
};

/*
 * Key of datagram_flows: when a packet of this flow last came in for a VIP port without endpoints (value: u64 ns); and
 * of told_flows.
 */
struct lbh_flow {
	struct lbh_address client;
	struct lbh_address vip;
	u16 client_port;
	u16 vip_port;
	u8 transport; /* IANA protocol number */
	u8 pad[3];
};
/*
 * Key of early_data: client and VIP port of a SYN that came with data, and the last byte of them, which its answer
 * acknowledges if they are taken.
 */
struct lbh_early {
	struct lbh_address client;
	struct lbh_address vip;
	u32 acknowledged;
	u16 client_port;
	u16 vip_port;
};

/*
 * told_flows: the entry of conntrack that was counted for a flow. An agent that begins reads all entries of conntrack,
 * because nobody listened before, and must not count again what another agent has heard of.
 */
struct lbh_told {
	u64 read_ns; /* when it was so read; 0: it was heard of */
	u32 id;	     /* CTA_ID: an entry keeps it, and another of the same flow hardly ever has the same */
	u32 pad;
};
/* Packets of one flow without endpoints are no further apart: nf_conntrack_udp_timeout, what it would be otherwise. */
#define LBH_FLOW_NS 30000000000ull

/* events, per CPU: what happened to records, and everything that could not be told. */
enum lbh_event {
	LBH_RECORD_SENT,
	LBH_RECORD_RATIO,      /* not sampled */
	LBH_RECORD_RATE,       /* over the rate */
	LBH_RECORD_RING_FULL,  /* the agent did not keep up */
	LBH_RECORD_NO_VERDICT, /* the handshake table had to make room, or the agent ended, before the verdict */
	LBH_RECORD_OFF,	       /* none are wanted */
	LBH_TRUNCATED,	       /* ends within a tag or a header, or its lengths are wrong */
	LBH_FRAGMENT,	       /* a later fragment of TCP: no TCP header in it */
	LBH_EXTENSION,	       /* more VLAN tags, or more or longer IPv6 extension headers, than are followed */
	LBH_ISN_SHARED,	       /* two untranslated connections with one ISN: the younger was taken */
	LBH_NO_SLOT,	       /* all slots of a bucket were being filled: a connection counted, but not followed */
	LBH_LATE,	       /* translated or answered after the verdict */
	LBH_NO_ROW,	       /* counters of a known id are missing: a defect */
	LBH_CONNTRACK_UNREAD,  /* a message of conntrack about a new connection that could not be read */
	LBH_EVENTS,
};

/* A client sends its SYN again after one second (RFC 6298, 2.1), a little more with a coarse clock. */
#define LBH_FIRST_RETRANSMIT_NS 1200000000ull
/*
 * A SYN on another interface within this time is the same packet one device further up or down, or on the other hook
 * (tc, XDP) of the same interface one hook further; so is a datagram that was counted as one without endpoints and that
 * conntrack tells of.
 */
#define LBH_SAME_PACKET_NS 200000000ull
/* Linux gives up connect() after 127 s (tcp_syn_retries 6): an older entry belongs to a connection of the past. */
#define LBH_FORGET_TICKS (135000000000ull >> LBH_TICK_SHIFT)

#endif
