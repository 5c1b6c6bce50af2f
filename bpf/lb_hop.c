// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Watches TCP handshakes to VIP ports on every interface of a node and tells their translation by the initial
 * sequence number (ISN), which NAT leaves alone: a SYN that comes in to a VIP port and a SYN with the same ISN
 * that leaves are the same packet before and after translation, whatever did the translating. What has no ISN, or
 * passes no interface on its way in, is told by conntrack.
 *
 * The programs only watch: on a packet's way every path returns TC_ACT_UNSPEC or XDP_PASS, and no packet is written to.
 * Compiled by bcc, which rewrites map.lookup() and the like only in this file, not in headers.
 */
#include <asm/byteorder.h>
#include <linux/errno.h>
#include <linux/pkt_cls.h>

#include "lb_hop.h"
#include "guard.h"
#include "conntrack.h"
#include "parse.h"

/* SYNs with data (Fast Open) that are kept for their answer, which comes within a round trip. */
#define LBH_EARLY_DATA 4096

/* Key: a destination. Value: its VIP port. Filled by the agent from the topology, as are the next three. */
BPF_F_TABLE("hash", struct lbh_vip_key, struct lbh_vip, vip_ports, LBH_MAX_VIP_PORTS, BPF_F_NO_PREALLOC);
/* Key: VIP port and translated destination. Value: the row of hop_stats to count it in. */
BPF_F_TABLE("hash", struct lbh_backend_key, u32, backends, LBH_MAX_BACKENDS, BPF_F_NO_PREALLOC);
/* Rows exist only for what the topology knows, so memory follows its size and not the maximum. */
BPF_F_TABLE("percpu_hash", u32, struct lbh_vip_stats, vip_stats, LBH_MAX_VIP_PORTS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("percpu_hash", u32, struct lbh_hop_stats, hop_stats, LBH_MAX_HOPS, BPF_F_NO_PREALLOC);
/* Key: a prefix. Value: where its addresses are. */
BPF_F_TABLE("lpm_trie", struct lbh_prefix, u32, places, LBH_MAX_PLACES, BPF_F_NO_PREALLOC);
/* Key: a flow that found no endpoint. Value: when a packet of it last came in. */
BPF_TABLE("lru_hash", struct lbh_flow, u64, datagram_flows, LBH_MAX_DATAGRAM_FLOWS);
BPF_TABLE("lru_hash", struct lbh_flow, struct lbh_told, told_flows, LBH_MAX_TOLD_FLOWS);
/* Key: what answers a SYN together with its data. Value: the SYN's ISN. */
BPF_TABLE("lru_hash", struct lbh_early, u32, early_data, LBH_EARLY_DATA);
/* One value. */
BPF_ARRAY(uplinks, struct lbh_uplinks, 1);
BPF_ARRAY(settings, struct lbh_settings, 1);
/* One value. When a SYN to a VIP port last came in, by a part of its ISN's hash. */
BPF_ARRAY(recent, struct lbh_recent, 1);
/* Index: bucket. Nobody maps these two: the kernel begins the values of such an array at a page, so at a cache line. */
BPF_F_TABLE("array", u32, struct lbh_tags, handshake_tags, LBH_TABLE_BUCKETS, BPF_F_MMAPABLE);
/* Index: bucket * LBH_WAYS + way. */
BPF_F_TABLE("array", u32, struct lbh_handshake, handshakes, LBH_TABLE_BUCKETS *LBH_WAYS, BPF_F_MMAPABLE);
BPF_PERCPU_ARRAY(events, u64, LBH_EVENTS);
/* When the next record would be due at exactly the record rate (GCRA). */
BPF_ARRAY(record_due_ns, u64, 1);
/* The bucket that the sweep looks at next. */
BPF_ARRAY(sweep_cursor, u32, 1);
BPF_RINGBUF_OUTPUT(records, LBH_RING_PAGES);

struct lbh_trace_id {
	u64 high;
	u64 low;
};

/* A place in the handshake table. */
struct lbh_match {
	struct lbh_tags *tags; /* of the bucket */
	u32 bucket;
	struct lbh_handshake *slot;
	u64 *tag;
	u64 seen_tag; /* the tag as it was when it matched */
};

static __always_inline void count_events(int event, u64 times)
{
	u64 *counter = events.lookup(&event);

	/* Atomic, as all that the sweep counts too: a softirq may come in between on the sweep's own CPU. */
	if (counter)
		__sync_fetch_and_add(counter, times);
}

static __always_inline void count_event(int event)
{
	count_events(event, 1);
}

static __always_inline u64 make_tag(u32 isn, u32 state, u64 ns)
{
	return (u64)isn << 32 | state << 29 | ((u32)(ns >> LBH_TICK_SHIFT) & LBH_TICK_MASK);
}

static __always_inline u32 tag_state(u64 tag)
{
	return (u32)tag >> 29;
}

static __always_inline u32 tag_age(u64 tag, u64 now)
{
	u32 age = ((u32)(now >> LBH_TICK_SHIFT) - (u32)tag) & LBH_TICK_MASK;

	/* The upper half is a tag from a moment after now was read: no age at all. */
	return age & ((age >> 28) - 1);
}

static __always_inline u64 with_state(u64 tag, u32 state)
{
	return (tag & ~(7ull << 29)) | (u64)state << 29;
}

/*
 * Replaces a slot's tag if it is still the one seen; false if another CPU was first. A full barrier: what was
 * written to the slot before is visible before the new tag.
 */
static __always_inline bool swap_tag(u64 *tag, u64 seen, u64 next)
{
#ifdef LBH_NO_COMPARE_EXCHANGE /* Linux < 5.12 has none: two CPUs on one slot at once may both win */
	if (*tag != seen)
		return false;
	*tag = next;
	return true;
#else
	return __sync_val_compare_and_swap(tag, seen, next) == seen;
#endif
}

/* Zero if they are the same. */
static __always_inline u32 address_difference(const struct lbh_address *a, const struct lbh_address *b)
{
	return (a->words[0] ^ b->words[0]) | (a->words[1] ^ b->words[1]) | (a->words[2] ^ b->words[2]) |
	       (a->words[3] ^ b->words[3]);
}

/* Finalizer of splitmix64 (Steele, Lea, Flood, 2014): every input bit reaches every output bit. */
static __always_inline u64 mix(u64 value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ull;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebull;
	return value ^ value >> 31;
}

/*
 * Multiply-add-shift hashing (Dietzfelbinger, 1996) with two secret numbers that are drawn for each load: nobody
 * outside can aim at one bucket.
 */
static __always_inline u32 hash_of(u32 isn)
{
	return isn * LBH_HASH_MULTIPLIER + LBH_HASH_ADDEND >> 32;
}

/* The cell in which the time of the latest SYN with such an ISN stands. */
static __always_inline u16 *recent_cell(u32 isn)
{
	int zero = 0;
	struct lbh_recent *cells = recent.lookup(&zero);

	return cells ? &cells->ticks[hash_of(isn) & (LBH_RECENT_CELLS - 1)] : NULL;
}

/*
 * False if no SYN to a VIP port with this ISN came in within so many ticks. Most handshakes on a node are not to its
 * VIP ports: they end here, on memory that is always in the cache, and cost no look into the table.
 */
static __always_inline bool maybe_recent(u32 isn, u64 now, u16 ticks)
{
	u16 *cell = recent_cell(isn);

	/* One more: another CPU may be a tick ahead. */
	return cell && (u16)((u16)(now >> LBH_TICK_SHIFT) - *cell + 1) <= ticks + 1;
}

static __always_inline void note_recent(u32 isn, u64 now)
{
	u16 *cell = recent_cell(isn);

	if (cell)
		*cell = now >> LBH_TICK_SHIFT;
}

/* Finds the bucket of an ISN; false only if the map is missing. */
static __always_inline bool find_bucket(struct lbh_match *match, u32 isn)
{
	match->bucket = hash_of(isn) & (LBH_TABLE_BUCKETS - 1);
	match->tags = handshake_tags.lookup(&match->bucket);
	return match->tags;
}

static __always_inline struct lbh_handshake *slot_of(u32 bucket, u32 way)
{
	u32 index = bucket * LBH_WAYS + way;

	return handshakes.lookup(&index);
}

/*
 * The bounds are 1, 2.5 and 5 times powers of ten (LBH_BOUNDS): first the power, then the place in it. Counted without
 * a branch, which the verifier need not follow.
 */
static __always_inline u32 histogram_bucket(u64 ns)
{
	u64 bound = LBH_FIRST_BOUND_NS;
	u32 bucket = 0, i;

#pragma unroll
	for (i = 0; i < (LBH_BUCKETS - 1) / 3 - 1; i++) {
		u64 above = (5 * bound - ns) >> 63;

		/* Or the compiler makes masks of it, and the verifier looks at either case of each. */
		asm volatile("" : "+r"(above));
		bucket += 3 * above;
		bound += 9 * bound * above;
	}
	return bucket + ((bound - ns) >> 63) + ((5 * bound / 2 - ns) >> 63) + ((5 * bound - ns) >> 63);
}

static __always_inline void observe(struct lbh_histogram *histogram, u64 ns)
{
	u32 bucket;

	/* Another CPU's clock may have been a moment ahead. */
	ns &= ~((s64)ns >> 63);
	bucket = hide(histogram_bucket(ns), histogram->sum_ns);
	histogram->sum_ns += ns;
	if (bucket < LBH_BUCKETS)
		histogram->buckets[bucket]++;
}

/*
 * The trace id comes from what both nodes of a hop see alike: the SNAT'd tuple and the ISN. For a connection that
 * was not translated it comes from the client's tuple. Mirrored by core/ids.py.
 */
static __always_inline struct lbh_trace_id trace_id_of(const struct lbh_handshake *slot, u32 isn, bool translated)
{
	struct lbh_address source, destination;
	u32 ports, yes = -(u32)translated, n;
	struct lbh_trace_id id;
	u64 hash;

	/* Values are chosen and not the pointers to them, which the verifier refuses without CAP_PERFMON. */
	asm volatile("" : "+r"(yes));
#pragma unroll
	for (n = 0; n < 4; n++) {
		source.words[n] = slot->client.words[n] ^ ((slot->client.words[n] ^ slot->snat.words[n]) & yes);
		destination.words[n] = slot->vip.words[n] ^ ((slot->vip.words[n] ^ slot->backend.words[n]) & yes);
	}
	ports = (u32)slot->client_port << 16 | slot->vip_port;
	ports ^= (ports ^ ((u32)slot->snat_port << 16 | slot->backend_port)) & yes;
	hash = mix((u64)ports << 32 | isn);
	hash = mix(hash ^ ((u64)source.words[1] << 32 | source.words[0]));
	hash = mix(hash ^ ((u64)source.words[3] << 32 | source.words[2]));
	hash = mix(hash ^ ((u64)destination.words[1] << 32 | destination.words[0]));
	hash = mix(hash ^ ((u64)destination.words[3] << 32 | destination.words[2]));
	id.low = hash;
	id.high = mix(hash ^ isn ^ 0x9e3779b97f4a7c15ull);
	return id;
}

/*
 * Whether the record rate (GCRA; two CPUs at once may both pass, the limit is soft) lets one more through that may run
 * so far ahead of it.
 */
static __always_inline bool within_rate(const struct lbh_settings *config, u64 now, u64 burst_ns)
{
	int zero = 0;
	u64 *due = record_due_ns.lookup(&zero), due_ns;

	if (!due)
		return false;
	/* Read once: what another CPU writes meanwhile must not turn the difference around. */
	due_ns = *(volatile u64 *)due;
	if (due_ns < now)
		*due = due_ns = now;
	if (due_ns - now > burst_ns)
		return false;
	__sync_fetch_and_add(due, config->record_interval_ns);
	return true;
}

/*
 * Sends one connection to the agent or counts why not. Good handshakes are sampled by trace id; a failure is kept
 * whatever the ratio, and where the rate is short it goes before: good ones leave the second half of the burst to it.
 * The agent drains by time: it is never woken for one record.
 */
static __always_inline void send_record(const struct lbh_handshake *slot, u32 isn, u32 verdict, u64 now)
{
	bool good = verdict == LBH_VERDICT_ANSWERED || verdict == LBH_VERDICT_REPLY_UNSEEN ||
		    verdict == LBH_VERDICT_TRANSLATED;
	bool translated = slot->forward_ns || verdict == LBH_VERDICT_TRANSLATED;
	struct lbh_settings *config;
	struct lbh_record *record;
	struct lbh_trace_id trace;
	int zero = 0;

	config = settings.lookup(&zero);
	if (!config)
		return;
	if (!config->record_interval_ns) {
		count_event(LBH_RECORD_OFF);
		return;
	}
	trace = trace_id_of(slot, isn, translated);
	if (good && (trace.low & ((1ull << 56) - 1)) < config->reject_below) {
		count_event(LBH_RECORD_RATIO);
		return;
	}
	if (!within_rate(config, now, good ? config->record_burst_ns : 2 * config->record_burst_ns)) {
		count_event(LBH_RECORD_RATE);
		return;
	}
	record = records.ringbuf_reserve(sizeof(*record));
	if (!record) {
		count_event(LBH_RECORD_RING_FULL);
		return;
	}
	__builtin_memset(record, 0, sizeof(*record));
	record->syn_ns = slot->syn_ns;
	record->forward_ns = slot->forward_ns;
	record->end_ns = now;
	record->trace_id[0] = __cpu_to_be64(trace.high);
	record->trace_id[1] = __cpu_to_be64(trace.low);
	record->client = slot->client;
	record->retransmits = slot->retransmits;
	record->client_port = __be16_to_cpu(slot->client_port);
	if (translated) {
		record->snat = slot->snat;
		record->snat_port = __be16_to_cpu(slot->snat_port);
		record->kind.backend = slot->backend;
		record->kind.backend_port = slot->backend_port;
		record->kind.translated = 1;
	}
	record->kind.verdict = verdict;
	record->kind.origin = slot->origin;
	record->kind.vip_id = slot->vip_id;
	record->kind.hop_id = slot->hop_id;
	record->kind.in_ifindex = slot->in_ifindex;
	records.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	count_event(LBH_RECORD_SENT);
}

static __always_inline void count_unforwarded(const struct lbh_handshake *slot)
{
	u32 vip_id = slot->vip_id, origin = slot->origin, reason = slot->unforwarded;
	struct lbh_vip_stats *stats = vip_stats.lookup(&vip_id);
	u32 row = hide(origin * LBH_UNFORWARDED_REASONS + reason, slot->syn_ns) & 7;

	if (!stats)
		count_event(LBH_NO_ROW);
	else if (row < LBH_ORIGINS * LBH_UNFORWARDED_REASONS)
		__sync_fetch_and_add(&stats->unforwarded[0][row], 1);
}

static __always_inline struct lbh_hop_stats *hop_stats_of(u32 hop_id)
{
	struct lbh_hop_stats *stats = hop_stats.lookup(&hop_id);

	if (!stats)
		count_event(LBH_NO_ROW);
	return stats;
}

/* A handshake without a verdict is given up: its slot has to make room, or the agent ends. That is its verdict. */
static __always_inline void count_evicted(const struct lbh_handshake *slot, u32 state)
{
	if (state == LBH_SEEN) {
		count_unforwarded(slot);
	} else {
		struct lbh_hop_stats *stats = hop_stats_of(slot->hop_id);

		if (stats)
			__sync_fetch_and_add(&stats->evicted, 1);
	}
	count_event(LBH_RECORD_NO_VERDICT);
}

/*
 * The searches below are arithmetic without a branch where they can be: a branch for each way would leave the verifier
 * with a state for each, and it would walk through everything that follows eight times.
 */
static __always_inline u64 is_zero(u64 value)
{
	return (value - 1 & ~value) >> 63;
}

/* A bit for each way that holds this ISN, in whatever state. */
static __always_inline u32 ways_with(const struct lbh_tags *tags, u32 isn)
{
	u32 i, ways = 0;

	LBH_LOOP
	for (i = 0; i < LBH_WAYS; i++)
		ways |= (u32)is_zero(tags->ways[i] >> 32 ^ isn) << i;
	return ways;
}

/* The number of the lowest bit: 2^0 to 2^7 have different remainders by 11. */
static __always_inline u32 lowest_way(u32 ways)
{
	return 0x56370420100ull >> (ways & -ways) % 11 * 4 & (LBH_WAYS - 1);
}

/*
 * How gladly a slot is given up: free, settled, unanswered, still open; within each those with the newcomer's own ISN
 * first, so that a flood with one ISN pushes out itself and not its neighbours; then the oldest; being filled, never.
 * An age has 28 bits. The way is in the low bits.
 */
static __always_inline u64 victim_score(u64 tag, u32 isn, u32 way, u64 now)
{
	u32 state = tag_state(tag);
	u64 rank = 0x210003u >> state * 4 & 3;
	u64 usable = is_zero(state ^ LBH_BUSY) - 1;
	u64 same = is_zero(tag >> 32 ^ isn);

	return ((rank << 29 | same << 28 | tag_age(tag, now)) << 3 & usable) | way;
}

/*
 * Takes a slot of the bucket for a new handshake. The table never refuses: in a full bucket the least needed
 * handshake gives way, and is counted. NULL only if other CPUs are filling what was chosen.
 */
static __always_inline struct lbh_handshake *take_slot(struct lbh_match *match, u32 isn, u64 now)
{
	u64 best = 0, tag;
	u32 i, way, state;

	LBH_LOOP
	for (i = 0; i < LBH_WAYS; i++) {
		s64 over = victim_score(match->tags->ways[i], isn, i, now) - best;

		best += over & ~(over >> 63);
	}
	way = hide(best, now) & (LBH_WAYS - 1);
	match->tag = &match->tags->ways[way];
	tag = *match->tag;
	state = tag_state(tag);
	match->slot = slot_of(match->bucket, way);
	if (!match->slot || state == LBH_BUSY || !swap_tag(match->tag, tag, with_state(tag, LBH_BUSY)))
		return NULL;
	match->seen_tag = with_state(tag, LBH_BUSY);
	if (state == LBH_SEEN || state == LBH_FORWARDED)
		count_evicted(match->slot, state);
	return match->slot;
}

/*
 * The entry of this client's connection to this VIP port, if the table has it. By address and not by id: a VIP port
 * gets another id when its Service changes, and an open connection stays the same.
 */
static __always_inline bool find_handshake(struct lbh_match *match, u32 isn, const struct lbh_address *client,
					   u16 client_port, const struct lbh_address *vip, u16 vip_port, u64 now)
{
	u32 n, ways = ways_with(match->tags, isn);

	LBH_LOOP
	for (n = 0; n < LBH_WAYS && ways; n++, ways &= ways - 1) {
		u32 way = lowest_way(ways);
		u64 tag = match->tags->ways[way];
		struct lbh_handshake *slot = slot_of(match->bucket, way);

		if (!slot || tag_state(tag) < LBH_SEEN || tag_age(tag, now) > LBH_FORGET_TICKS)
			continue;
		if (slot->client_port != client_port || slot->vip_port != vip_port ||
		    address_difference(&slot->client, client) || address_difference(&slot->vip, vip))
			continue;
		match->slot = slot;
		match->tag = &match->tags->ways[way];
		match->seen_tag = tag;
		return true;
	}
	return false;
}

/*
 * The youngest entry that waits for its translation under this packet's ISN. A packet that still goes to an entry's
 * VIP is not that entry's translation; if it is also from that entry's client, it was bridged or routed on as it came,
 * and is nobody's. Nor is a translation that an entry has already, which passes one more hook or was sent again,
 * anybody else's.
 *
 * `ways` is volatile, so kept in memory, for the code that comes of it: with all of the loop in registers, what is
 * copied at its end falls through into its beginning, and a loop that is closed so is refused before Linux 6.7.
 */
static __always_inline bool find_untranslated(struct lbh_match *match, const struct lbh_packet *packet)
{
	u32 isn = packet->sequence, n;
	volatile u32 ways = ways_with(match->tags, isn);
	u64 youngest_ns = 0, best = 0, waiting = 0, late = 0, known = 0;

	LBH_LOOP
	for (n = 0; n < LBH_WAYS && ways; n++, ways &= ways - 1) {
		u32 way = lowest_way(ways), state = tag_state(match->tags->ways[way]);
		struct lbh_handshake *slot = slot_of(match->bucket, way);
		u64 to_vip, waits;
		s64 over, younger;

		if (!slot)
			return false;
		to_vip = is_zero(address_difference(&slot->vip, &packet->destination) |
				 (slot->vip_port ^ packet->destination_port));
		known |= to_vip & is_zero(address_difference(&slot->client, &packet->source) |
					  (slot->client_port ^ packet->source_port));
		known |= ~is_zero(slot->forward_ns) & is_zero(address_difference(&slot->snat, &packet->source) |
							      address_difference(&slot->backend, &packet->destination) |
							      (slot->snat_port ^ packet->source_port) |
							      (slot->backend_port ^ packet->destination_port));
		late += is_zero(state ^ LBH_UNANSWERED) & is_zero(slot->forward_ns) & ~to_vip;
		waits = is_zero(state ^ LBH_SEEN) & ~to_vip;
		waiting += waits;
		over = (slot->syn_ns & -waits) - youngest_ns;
		younger = ~(over >> 63);
		youngest_ns += over & younger;
		best = (best & ~younger) | (way & younger);
	}
	if (known)
		return false;
	if (late)
		count_events(LBH_LATE, late);
	if (!waiting)
		return false;
	if (waiting > 1)
		count_events(LBH_ISN_SHARED, waiting - 1);
	best = hide(best, isn) & (LBH_WAYS - 1);
	match->tag = &match->tags->ways[best];
	match->seen_tag = *match->tag;
	match->slot = slot_of(match->bucket, best);
	return match->slot && match->seen_tag >> 32 == isn && tag_state(match->seen_tag) == LBH_SEEN;
}

/* Whether a SYN that came in by this interface came from outside the cluster. */
static __always_inline u32 origin_of(u32 ifindex)
{
	int zero = 0;
	struct lbh_uplinks *list = uplinks.lookup(&zero);
	u32 i;

	LBH_LOOP
	for (i = 0; list && i < LBH_MAX_UPLINKS; i++) {
		u32 uplink = list->ifindexes[i];

		if (!uplink)
			break;
		if (uplink == ifindex)
			return LBH_EXTERNAL;
	}
	return LBH_INTERNAL;
}

/* Why a connection that begins now would not be translated: policy Local binds only what comes from outside. */
static __always_inline u8 reason_of(const struct lbh_vip *vip, u32 origin)
{
	if (origin == LBH_INTERNAL && vip->unforwarded == LBH_NO_LOCAL_ENDPOINTS)
		return LBH_DROPPED;
	return vip->unforwarded;
}

/* A SYN with data will be answered under another number than its ISN. */
static __always_inline void note_early_data(const struct lbh_packet *packet, u64 now)
{
	u32 isn = packet->sequence;
	struct lbh_early early = {.client = packet->source,
				  .vip = packet->destination,
				  .acknowledged = isn + packet->data_length,
				  .client_port = packet->source_port,
				  .vip_port = packet->destination_port};

	early_data.update(&early, &isn);
	note_recent(early.acknowledged, now);
}

/* A SYN came in to a VIP port: a new connection, the same packet one device further, or a retransmission. */
static __always_inline void syn_in(struct lbh_context context, const struct lbh_packet *packet)
{
	struct lbh_vip_key key = {
		.address = packet->destination, .port = packet->destination_port, .transport = IPPROTO_TCP};
	struct lbh_vip *vip = vip_ports.lookup(&key);
	struct lbh_match match = {};
	struct lbh_vip_stats *stats;
	struct lbh_handshake *slot;
	u32 vip_id, origin, ifindex = lbh_ifindex(context);
	u64 now;

	if (!vip)
		return;
	vip_id = vip->vip_id;
	stats = vip_stats.lookup(&vip_id);
	if (!stats || !find_bucket(&match, packet->sequence)) {
		count_event(LBH_NO_ROW);
		return;
	}
	now = bpf_ktime_get_ns();
	note_recent(packet->sequence, now);
	if (packet->data_length)
		note_early_data(packet, now);
	if (find_handshake(&match, packet->sequence, &packet->source, packet->source_port, &packet->destination,
			   packet->destination_port, now)) {
		u64 gap_ns = now - match.slot->last_syn_ns;

		match.slot->last_syn_ns = now;
		/* Both hooks of one interface see a packet only while the agent changes from one to the other. */
		if ((match.slot->in_ifindex == ifindex && match.slot->xdp == context.xdp) ||
		    gap_ns > LBH_SAME_PACKET_NS) {
			/* Stays at its highest: back at zero, a storm would end as if nothing had been sent again. */
			if (match.slot->retransmits < 0xffff)
				match.slot->retransmits++;
			/* The VIP port may have gone over to another Service since. */
			vip_id = match.slot->vip_id;
			stats = vip_stats.lookup(&vip_id);
			if (stats)
				stats->retransmits++;
			else
				count_event(LBH_NO_ROW);
		}
		return;
	}
	origin = hide(origin_of(ifindex), now) & 1;
	stats->connections[origin]++;
	slot = take_slot(&match, packet->sequence, now);
	if (!slot) {
		/* Nobody will tell what becomes of it: its verdict is now, so that the counts still add up. */
		stats->unforwarded[origin][LBH_DROPPED]++;
		count_event(LBH_NO_SLOT);
		count_event(LBH_RECORD_NO_VERDICT);
		return;
	}
	slot->syn_ns = slot->last_syn_ns = now;
	slot->client = packet->source;
	slot->vip = packet->destination;
	slot->client_port = packet->source_port;
	slot->vip_port = packet->destination_port;
	slot->vip_id = slot->hop_id = vip_id;
	slot->in_ifindex = ifindex;
	slot->xdp = context.xdp;
	slot->retransmits = 0;
	slot->origin = origin;
	slot->unforwarded = reason_of(vip, origin);
	slot->forward_ns = 0;
	swap_tag(match.tag, match.seen_tag, make_tag(packet->sequence, LBH_SEEN, now));
}

/* A SYN leaves: if its ISN is remembered, it is the translated packet, and names backend and SNAT source. */
static __always_inline void syn_out(const struct lbh_packet *packet)
{
	struct lbh_backend_key key = {.address = packet->destination, .port = packet->destination_port};
	struct lbh_match match = {};
	struct lbh_handshake *slot;
	struct lbh_hop_stats *stats;
	u32 *known, hop_id, origin;
	u64 now, filling, took_ns;

	now = bpf_ktime_get_ns();
	if (!maybe_recent(packet->sequence, now, LBH_TRANSLATION_TICKS) || !find_bucket(&match, packet->sequence))
		return;
	if (!find_untranslated(&match, packet))
		return;
	slot = match.slot;
	/* Claimed while it is written, so that neither a sweep nor an eviction sees half of it. */
	filling = with_state(match.seen_tag, LBH_BUSY);
	if (!swap_tag(match.tag, match.seen_tag, filling))
		return;
	key.vip_id = slot->vip_id;
	known = backends.lookup(&key);
	slot->hop_id = hop_id = known ? *known : slot->vip_id;
	slot->forward_ns = now;
	slot->snat = packet->source;
	slot->snat_port = packet->source_port;
	slot->backend = packet->destination;
	slot->backend_port = packet->destination_port;
	origin = slot->origin;
	took_ns = now - slot->syn_ns;
	swap_tag(match.tag, filling, with_state(filling, LBH_FORWARDED));
	stats = hop_stats_of(hop_id);
	if (stats) {
		stats->forwarded[hide(origin, now) & 1]++;
		observe(&stats->forward, took_ns);
	}
}

/*
 * The ISN of the SYN that a SYN-ACK or RST answers. It acknowledges with it what data the SYN had, if they were taken
 * (RFC 7413, 4.2) or the connection is refused (RFC 9293, 3.10.7.1).
 */
static __always_inline u32 answered_isn(const struct lbh_packet *packet, u32 acknowledged)
{
	struct lbh_early early = {.client = packet->destination,
				  .vip = packet->source,
				  .acknowledged = acknowledged,
				  .client_port = packet->destination_port,
				  .vip_port = packet->source_port};
	u32 *isn = early_data.lookup(&early);

	return isn ? *isn : acknowledged;
}

/* A SYN-ACK or RST leaves from a VIP port: the end of the handshake that its acknowledgment number names. */
static __always_inline void answer_out(const struct lbh_packet *packet)
{
	u32 isn = packet->acknowledgment - 1, verdict = LBH_VERDICT_ANSWERED, state;
	bool refused = packet->flags & LBH_TCP_RST;
	struct lbh_match match = {};
	struct lbh_handshake *slot;
	struct lbh_hop_stats *stats;
	u64 now, claimed;

	/* Not by a look at vip_ports: a handshake outlives the VIP port that is deleted meanwhile. */
	now = bpf_ktime_get_ns();
	if (!maybe_recent(isn, now, LBH_ANSWER_TICKS))
		return;
	isn = answered_isn(packet, isn);
	if (!find_bucket(&match, isn))
		return;
	if (!find_handshake(&match, isn, &packet->destination, packet->destination_port, &packet->source,
			    packet->source_port, now))
		return;
	state = tag_state(match.seen_tag);
	if (state == LBH_UNANSWERED && !refused)
		count_event(LBH_LATE);
	if (state != LBH_SEEN && state != LBH_FORWARDED)
		return;
	/* Claimed while it is read, so that nobody puts another handshake there meanwhile. */
	claimed = with_state(match.seen_tag, LBH_BUSY);
	if (!swap_tag(match.tag, match.seen_tag, claimed))
		return;
	slot = match.slot;
	if (state == LBH_SEEN && refused) {
		/* Refused by this node itself: no backend was asked. */
		count_unforwarded(slot);
		verdict = LBH_VERDICT_UNFORWARDED + slot->unforwarded;
	} else {
		stats = hop_stats_of(slot->hop_id);
		if (stats) {
			/* Answered without a translated SYN at a hook: a backend reached by a way around them. */
			if (state == LBH_SEEN)
				stats->forwarded[hide(slot->origin, now) & 1]++;
			if (refused) {
				stats->refused++;
			} else {
				stats->answered++;
				observe(&stats->handshake, now - slot->syn_ns);
			}
		}
		if (refused)
			verdict = LBH_VERDICT_REFUSED;
	}
	send_record(slot, isn, verdict, now);
	swap_tag(match.tag, claimed, with_state(claimed, LBH_SETTLED));
}

/* Gives the verdict over a slot that has waited long enough; tag is as it was before the slot was claimed. */
static __always_inline void close_overdue(const struct lbh_handshake *slot, u64 tag, u64 now)
{
	struct lbh_hop_stats *stats;
	u32 verdict;

	if (tag_state(tag) == LBH_SEEN) {
		count_unforwarded(slot);
		verdict = LBH_VERDICT_UNFORWARDED + slot->unforwarded;
	} else {
		bool again = slot->retransmits;

		if (!again && now - slot->syn_ns < LBH_FIRST_RETRANSMIT_NS) {
			/* Only when the agent ends: too early to say whether the client would have asked again. */
			count_evicted(slot, LBH_FORWARDED);
			return;
		}
		stats = hop_stats_of(slot->hop_id);
		verdict = again ? LBH_VERDICT_TIMEOUT : LBH_VERDICT_REPLY_UNSEEN;
		if (stats && again)
			stats->timeout++;
		else if (stats)
			stats->reply_unseen++;
	}
	send_record(slot, tag >> 32, verdict, now);
}

static __always_inline int watch(struct lbh_context context, bool ethernet, bool ingress)
{
	struct lbh_packet packet = {};
	u8 flags;
	int parsed;

	if (lbh_is_dull(context, ethernet, ingress))
		return TC_ACT_UNSPEC;
	parsed = lbh_parse_plain(context, ethernet, &packet) ? LBH_HANDSHAKE
							     : lbh_parse(context, ethernet, false, &packet);
	flags = packet.flags & (LBH_TCP_SYN | LBH_TCP_ACK | LBH_TCP_RST | LBH_TCP_FIN);
	/* What comes in and is no SYN is of no interest, whatever its lengths are: so lbh_is_dull has it too. */
	if (parsed == LBH_OTHER || (ingress && flags && flags != LBH_TCP_SYN))
		return TC_ACT_UNSPEC;
	if (parsed != LBH_HANDSHAKE) {
		count_event(LBH_TRUNCATED + parsed - LBH_PARSE_TRUNCATED);
		return TC_ACT_UNSPEC;
	}
	if (ingress) {
		syn_in(context, &packet);
	} else if (flags == LBH_TCP_SYN) {
		syn_out(&packet);
	} else if (flags == (LBH_TCP_SYN | LBH_TCP_ACK) || flags == (LBH_TCP_RST | LBH_TCP_ACK)) {
		answer_out(&packet);
	}
	return TC_ACT_UNSPEC;
}

int lbh_ingress(struct __sk_buff *skb)
{
	return watch(lbh_tc_context(skb), true, true);
}

int lbh_egress(struct __sk_buff *skb)
{
	return watch(lbh_tc_context(skb), true, false);
}

/* For devices without an Ethernet header. */
int lbh_ingress_l3(struct __sk_buff *skb)
{
	return watch(lbh_tc_context(skb), false, true);
}

int lbh_egress_l3(struct __sk_buff *skb)
{
	return watch(lbh_tc_context(skb), false, false);
}

#ifdef LBH_XDP /* only where the agent is told to watch uplinks by XDP */
/*
 * In place of lbh_ingress on an uplink, before the stack and all of tc. Devices without an Ethernet header have no
 * driver that runs XDP, and their packets do not tell it what they are.
 */
int lbh_xdp(struct xdp_md *frame)
{
	watch(lbh_xdp_context(frame), true, true);
	return XDP_PASS;
}
#endif

/*
 * Never attached: the agent runs it by BPF_PROG_TEST_RUN, once for each bucket (repeat), to give the verdict over
 * handshakes that nobody answered. Done here so that counters and states have one writer side.
 */
int lbh_sweep(struct __sk_buff *skb)
{
	struct lbh_settings *config;
	struct lbh_tags *tags;
	u32 *cursor, bucket, i;
	int zero = 0;
	u64 now = bpf_ktime_get_ns(), wait_ns;

	config = settings.lookup(&zero);
	cursor = sweep_cursor.lookup(&zero);
	if (!config || !cursor)
		return TC_ACT_UNSPEC;
	bucket = (*cursor)++ & (LBH_TABLE_BUCKETS - 1);
	tags = handshake_tags.lookup(&bucket);
	if (!tags)
		return TC_ACT_UNSPEC;
	wait_ns = config->verdict_after_ns;
	LBH_LOOP
	for (i = 0; i < LBH_WAYS; i++) {
		u64 tag = tags->ways[i];
		u32 state = tag_state(tag);
		s64 over_ns = ((u64)tag_age(tag, now) << LBH_TICK_SHIFT) - wait_ns;
		struct lbh_handshake *slot;

		if (!((is_zero(state ^ LBH_SEEN) | is_zero(state ^ LBH_FORWARDED)) & ~(over_ns >> 63)))
			continue;
		slot = slot_of(bucket, i);
		if (!slot || !swap_tag(&tags->ways[i], tag, with_state(tag, LBH_BUSY)))
			continue;
		close_overdue(slot, tag, now);
		swap_tag(&tags->ways[i], with_state(tag, LBH_BUSY), with_state(tag, LBH_UNANSWERED));
	}
	return TC_ACT_UNSPEC;
}

/* Whether a packet of this flow was counted as one without endpoints a moment ago. */
static __always_inline bool is_told(const struct lbh_tuple *tuple, u64 now)
{
	struct lbh_flow flow = {.client = tuple->source,
				.vip = tuple->destination,
				.client_port = tuple->source_port,
				.vip_port = tuple->destination_port,
				.transport = tuple->transport};
	u64 *last_ns = datagram_flows.lookup(&flow);

	return last_ns && (s64)(now - *last_ns) < (s64)LBH_SAME_PACKET_NS;
}

static __always_inline u32 place_of(const struct lbh_address *address)
{
	struct lbh_prefix prefix = {.bits = 128, .address = *address};
	u32 *place = places.lookup(&prefix);

	return place ? *place : LBH_OUTSIDE;
}

/*
 * A connection is known and its verdict is at hand. All is counted by atomic additions: this runs in the context of a
 * process too, where a softirq may come in between and count in the same row.
 */
static __always_inline void count_told(const struct lbh_handshake *slot, u32 verdict)
{
	u32 vip_id = slot->vip_id, origin = hide(slot->origin, slot->syn_ns) & 1;
	struct lbh_vip_stats *stats = vip_stats.lookup(&vip_id);
	struct lbh_hop_stats *hop;

	if (!stats) {
		count_event(LBH_NO_ROW);
		return;
	}
	__sync_fetch_and_add(&stats->connections[origin], 1);
	if (verdict != LBH_VERDICT_TRANSLATED) {
		count_unforwarded(slot);
	} else {
		hop = hop_stats_of(slot->hop_id);
		if (hop) {
			__sync_fetch_and_add(&hop->forwarded[origin], 1);
			__sync_fetch_and_add(&hop->translated, 1);
		}
	}
	/* In place of an ISN the time, so that a tuple that is used again is another trace. */
	send_record(slot, slot->syn_ns, verdict, slot->syn_ns);
}

/* Whether this entry of conntrack has been counted; if not, it now is. */
static __always_inline bool is_entry_known(const struct lbh_tuple *tuple, u32 id, bool listed, u64 now)
{
	struct lbh_flow flow = {.client = tuple->source,
				.vip = tuple->destination,
				.client_port = tuple->source_port,
				.vip_port = tuple->destination_port,
				.transport = tuple->transport};
	struct lbh_told told = {.read_ns = listed ? now : 0, .id = id}, *known = told_flows.lookup(&flow);

	/* News of an entry may come a moment after it was read. */
	if (known && known->id == id &&
	    (listed || (known->read_ns && (s64)(now - known->read_ns) < (s64)LBH_SAME_PACKET_NS)))
		return true;
	told_flows.update(&flow, &told);
	return false;
}

/*
 * Filter of a socket in the ctnetlink group of new connections; it keeps nothing, so that nothing waits in the socket.
 * Conntrack tells of a connection when its first packet has passed, with the translation that was chosen: the source
 * of the reply is the backend, its destination the SNAT source. It does not tell the interface.
 */
int lbh_conntrack(struct __sk_buff *skb)
{
	struct lbh_tuple original = {}, reply = {};
	struct lbh_handshake slot = {};
	struct lbh_backend_key backend = {};
	struct lbh_vip_key key = {};
	struct lbh_ct_message message;
	struct lbh_settings *config;
	struct lbh_vip *vip;
	u32 *known, place, verdict;
	int zero = 0, read;

	config = settings.lookup(&zero);
	read = lbh_ct_begin(skb, &message);
	if (read == LBH_CT_READ)
		read = lbh_ct_find_tuple(skb, &message, CTA_TUPLE_ORIG, &original);
	if (read == LBH_CT_UNREAD)
		count_event(LBH_CONNTRACK_UNREAD);
	if (read != LBH_CT_READ || !config || (original.transport == IPPROTO_TCP && !config->own_calls))
		return 0;
	key.address = original.destination;
	key.port = original.destination_port;
	key.transport = original.transport;
	vip = vip_ports.lookup(&key);
	if (!vip)
		return 0;
	place = place_of(&original.source);
	/* A TCP connection that came in by an interface is counted there. */
	if (original.transport == IPPROTO_TCP && place != LBH_THIS_NODE)
		return 0;
	if (lbh_ct_find_tuple(skb, &message, CTA_TUPLE_REPLY, &reply) != LBH_CT_READ) {
		count_event(LBH_CONNTRACK_UNREAD);
		return 0;
	}
	slot.syn_ns = bpf_ktime_get_ns();
	if (is_told(&original, slot.syn_ns)) {
		count_event(LBH_LATE);
		return 0;
	}
	if (is_entry_known(&original, lbh_ct_find_id(skb, &message), message.listed, slot.syn_ns))
		return 0;
	slot.client = original.source;
	slot.client_port = original.source_port;
	slot.vip = original.destination;
	slot.vip_port = original.destination_port;
	slot.vip_id = slot.hop_id = backend.vip_id = vip->vip_id;
	slot.origin = place == LBH_OUTSIDE ? LBH_EXTERNAL : LBH_INTERNAL;
	slot.unforwarded = reason_of(vip, slot.origin);
	verdict = LBH_VERDICT_UNFORWARDED + slot.unforwarded;
	if (address_difference(&reply.source, &original.destination) |
	    (reply.source_port ^ original.destination_port)) {
		verdict = LBH_VERDICT_TRANSLATED;
		slot.snat = reply.destination;
		slot.snat_port = reply.destination_port;
		slot.backend = backend.address = reply.source;
		slot.backend_port = backend.port = reply.source_port;
		known = backends.lookup(&backend);
		if (known)
			slot.hop_id = *known;
	}
	count_told(&slot, verdict);
	return 0;
}

/*
 * A datagram to a VIP port that has no endpoints: it is rejected before conntrack tells of it. The first of a flow is a
 * connection, never forwarded. Without endpoints here (policy Local) only what comes from outside is rejected.
 */
static __always_inline void datagram_in(struct __sk_buff *skb, const struct lbh_packet *packet)
{
	struct lbh_vip_key key = {
		.address = packet->destination, .port = packet->destination_port, .transport = packet->transport};
	struct lbh_vip *vip = vip_ports.lookup(&key);
	struct lbh_handshake slot = {};
	struct lbh_flow flow = {};
	u64 *last_ns, seen_ns, now;
	int error;

	if (!vip || vip->unforwarded == LBH_DROPPED)
		return;
	slot.in_ifindex = skb->ifindex;
	slot.origin = origin_of(slot.in_ifindex);
	slot.unforwarded = reason_of(vip, slot.origin);
	if (slot.unforwarded == LBH_DROPPED)
		return;
	now = bpf_ktime_get_ns();
	slot.syn_ns = now;
	slot.client = flow.client = packet->source;
	slot.client_port = flow.client_port = packet->source_port;
	slot.vip = flow.vip = packet->destination;
	slot.vip_port = flow.vip_port = packet->destination_port;
	flow.transport = packet->transport;
	slot.vip_id = slot.hop_id = vip->vip_id;
	last_ns = datagram_flows.lookup(&flow);
	if (last_ns) {
		seen_ns = *last_ns;
		/* Another CPU may be a moment ahead. */
		if ((s64)(now - seen_ns) < (s64)LBH_FLOW_NS) {
			*last_ns = now;
			return;
		}
		if (!swap_tag(last_ns, seen_ns, now))
			return;
	} else {
		error = datagram_flows.insert(&flow, &now);
		if (error == -EEXIST)
			return;
		if (error)
			count_event(LBH_NO_SLOT);
	}
	count_told(&slot, LBH_VERDICT_UNFORWARDED + slot.unforwarded);
}

static __always_inline int watch_datagrams(struct __sk_buff *skb, bool ethernet)
{
	struct lbh_packet packet = {};
	int parsed = lbh_parse(lbh_tc_context(skb), ethernet, true, &packet);

	if (parsed == LBH_HANDSHAKE)
		datagram_in(skb, &packet);
	/* What ends before its transport is counted by lbh_ingress; a later fragment needs no ports: the first has
	 * them. */
	else if (parsed == LBH_PARSE_TRUNCATED && packet.transport)
		count_event(LBH_TRUNCATED);
	return TC_ACT_UNSPEC;
}

/* On tc ingress beside lbh_ingress or lbh_xdp (which passes all on), and only while a VIP port of UDP or SCTP has no
 * endpoints. */
int lbh_datagram(struct __sk_buff *skb)
{
	return watch_datagrams(skb, true);
}

int lbh_datagram_l3(struct __sk_buff *skb)
{
	return watch_datagrams(skb, false);
}
