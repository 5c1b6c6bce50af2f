/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * From a packet to its TCP handshake fields, or to the ports of a datagram (UDP, or SCTP with an INIT): whether a
 * program looks at datagrams is known when it is compiled. Reads only, changes nothing, takes any bytes.
 */
#ifndef LBH_PARSE_H
#define LBH_PARSE_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define LBH_TCP_FIN 0x01
#define LBH_TCP_SYN 0x02
#define LBH_TCP_RST 0x04
#define LBH_TCP_ACK 0x10

#define LBH_VLAN_TAGS 2
#define LBH_EXTENSION_HEADERS 6
/* The verifier wants a bound on what is added to a packet pointer; no header chain of a SYN comes near it. */
#define LBH_MAX_OFFSET 4096

/* What the IP header says of the packet's size, which the stack goes by (ip_rcv_core, ip6_rcv_core). */
struct lbh_extent {
	u32 end;	/* where the packet ends, as an offset; what follows in the frame is padding */
	bool continued; /* its transport goes on in a later fragment */
};

struct lbh_packet {
	struct lbh_address source;
	struct lbh_address destination;
	u16 source_port;
	u16 destination_port;
	u32 sequence;	    /* host order */
	u32 acknowledgment; /* host order */
	u16 data_length;    /* of a handshake: what a SYN carries with it (Fast Open) */
	u8 flags;
	u8 transport; /* of a datagram */
};

/* RFC 9260, 3.1 and 3.2: the common header, and the first byte of the first chunk behind it. */
#define LBH_SCTP_CHUNK_OFFSET 12
#define LBH_SCTP_INIT 1
#define LBH_SCTP_INIT_SIZE 20

enum lbh_parsed {
	LBH_HANDSHAKE, /* TCP with SYN or RST, or a datagram: the packet is filled in */
	LBH_OTHER,     /* anything else that is whole */
	LBH_PARSE_TRUNCATED,
	LBH_PARSE_FRAGMENT,
	LBH_PARSE_EXTENSION,
};

struct lbh_vlan_tag {
	u16 control;
	u16 ethertype;
};

struct lbh_extension {
	u8 next;
	u8 length;
	u16 offset_flags; /* fragment header only (RFC 8200, 4.5) */
	u32 identification;
};

/*
 * What a program is given with a packet: struct __sk_buff on a tc hook, struct xdp_md on XDP. Which of them is known
 * when it is compiled, so that nothing is spent on the difference.
 */
struct lbh_context {
	void *given;
	bool xdp;
};

static __always_inline struct lbh_context lbh_tc_context(struct __sk_buff *skb)
{
	return (struct lbh_context){.given = skb, .xdp = false};
}

static __always_inline struct lbh_context lbh_xdp_context(struct xdp_md *frame)
{
	return (struct lbh_context){.given = frame, .xdp = true};
}

static __always_inline void *lbh_data(struct lbh_context context)
{
	return (void *)(long)(context.xdp ? ((struct xdp_md *)context.given)->data
					  : ((struct __sk_buff *)context.given)->data);
}

static __always_inline void *lbh_data_end(struct lbh_context context)
{
	return (void *)(long)(context.xdp ? ((struct xdp_md *)context.given)->data_end
					  : ((struct __sk_buff *)context.given)->data_end);
}

/* The interface that the packet is at. */
static __always_inline u32 lbh_ifindex(struct lbh_context context)
{
	return context.xdp ? ((struct xdp_md *)context.given)->ingress_ifindex
			   : ((struct __sk_buff *)context.given)->ifindex;
}

/* The EtherType that the stack knows; none on XDP, which is before the stack. */
static __always_inline u16 lbh_protocol(struct lbh_context context)
{
	return context.xdp ? 0 : ((struct __sk_buff *)context.given)->protocol;
}

/*
 * A pointer to size bytes at offset: into the packet where they are linear, else to a copy in buffer (headers
 * may lie in page fragments of the skb). NULL if the packet ends before. On XDP all that there is is linear: the kernel
 * gives packets in several buffers only to programs that ask for them (BPF_F_XDP_HAS_FRAGS), which ours does not.
 * Guarded, always a copy: what the packet says must not be added to a pointer.
 */
static __always_inline void *lbh_header(struct lbh_context context, u32 offset, void *buffer, u32 size)
{
#ifdef LBH_GUARDED
	if (context.xdp)
		return bpf_xdp_load_bytes(context.given, offset, buffer, size) ? NULL : buffer;
#else
	void *start = lbh_data(context) + offset;

	if (start + size <= lbh_data_end(context))
		return start;
	if (context.xdp)
		return NULL;
#endif
	return bpf_skb_load_bytes(context.given, offset, buffer, size) ? NULL : buffer;
}

/* How long the whole packet is. */
static __always_inline u32 lbh_length(struct lbh_context context)
{
	if (!context.xdp)
		return ((struct __sk_buff *)context.given)->len;
#ifdef LBH_GUARDED
	return bpf_xdp_get_buff_len(context.given);
#else
	return lbh_data_end(context) - lbh_data(context);
#endif
}

/* Whether a header lies wholly in the packet, by what is there and by what the packet says of its size. */
static __always_inline bool lbh_holds(struct lbh_context context, const struct lbh_extent *extent, u32 offset, u32 size)
{
	return extent->end <= lbh_length(context) && offset + size <= extent->end;
}

/*
 * A handshake counts only if conntrack would take it for one (tcp_error), and NAT with it: what it would not is
 * truncated. Options may go on in a later fragment. Looked at for handshakes only: nothing else pays for it.
 */
static __always_inline int lbh_parse_tcp(struct lbh_context context, const struct lbh_extent *extent, u32 offset,
					 struct lbh_packet *packet)
{
	struct tcphdr buffer, *tcp = lbh_header(context, offset, &buffer, sizeof(buffer));

	if (!tcp)
		return LBH_PARSE_TRUNCATED;
	packet->flags = ((u8 *)tcp)[13];
	if (!(packet->flags & (LBH_TCP_SYN | LBH_TCP_RST)))
		return LBH_OTHER;
	packet->source_port = tcp->source;
	packet->destination_port = tcp->dest;
	packet->sequence = bpf_ntohl(tcp->seq);
	packet->acknowledgment = bpf_ntohl(tcp->ack_seq);
	if (tcp->doff < 5 || !lbh_holds(context, extent, offset, extent->continued ? sizeof(*tcp) : tcp->doff * 4))
		return LBH_PARSE_TRUNCATED;
	if (!extent->continued)
		packet->data_length = extent->end - offset - tcp->doff * 4;
	return LBH_HANDSHAKE;
}

static __always_inline int lbh_parse_datagram(struct lbh_context context, const struct lbh_extent *extent, u32 offset,
					      u8 protocol, struct lbh_packet *packet)
{
	struct udphdr buffer, *udp = lbh_header(context, offset, &buffer, sizeof(buffer));
	u8 copy, *chunk;

	packet->transport = protocol;
	if (!udp)
		return LBH_PARSE_TRUNCATED;
	/* SCTP begins with its ports as UDP does. */
	packet->source_port = udp->source;
	packet->destination_port = udp->dest;
	if (protocol != IPPROTO_SCTP) {
		u32 length = bpf_ntohs(udp->len);

		/* As udp_error does. */
		if (length < sizeof(*udp) ||
		    !lbh_holds(context, extent, offset, extent->continued ? sizeof(*udp) : length))
			return LBH_PARSE_TRUNCATED;
		return LBH_HANDSHAKE;
	}
	chunk = lbh_header(context, offset + LBH_SCTP_CHUNK_OFFSET, &copy, sizeof(copy));
	if (!chunk)
		return LBH_PARSE_TRUNCATED;
	if (*chunk != LBH_SCTP_INIT)
		return LBH_OTHER;
	if (!lbh_holds(context, extent, offset, LBH_SCTP_CHUNK_OFFSET + LBH_SCTP_INIT_SIZE))
		return LBH_PARSE_TRUNCATED;
	return LBH_HANDSHAKE;
}

static __always_inline bool lbh_wants(bool datagrams, u8 protocol)
{
	return datagrams ? protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP : protocol == IPPROTO_TCP;
}

static __always_inline int lbh_parse_transport(struct lbh_context context, bool datagrams,
					       const struct lbh_extent *extent, u32 offset, u8 protocol,
					       struct lbh_packet *packet)
{
	return datagrams ? lbh_parse_datagram(context, extent, offset, protocol, packet)
			 : lbh_parse_tcp(context, extent, offset, packet);
}

static __always_inline int lbh_parse_ipv4(struct lbh_context context, bool datagrams, u32 offset,
					  struct lbh_packet *packet)
{
	struct iphdr buffer, *ip = lbh_header(context, offset, &buffer, sizeof(buffer));
	struct lbh_extent extent;
	int parsed;

	if (!ip)
		return LBH_PARSE_TRUNCATED;
	if (!lbh_wants(datagrams, ip->protocol) || ip->version != 4 || ip->ihl < 5)
		return LBH_OTHER;
	if (ip->frag_off & bpf_htons(0x1fff))
		return LBH_PARSE_FRAGMENT;
	extent.end = offset + bpf_ntohs(ip->tot_len);
	extent.continued = ip->frag_off & bpf_htons(0x2000);
	parsed = lbh_parse_transport(context, datagrams, &extent, offset + ip->ihl * 4, ip->protocol, packet);
	if (parsed != LBH_HANDSHAKE)
		return parsed;
	packet->source.words[0] = packet->source.words[1] = 0;
	packet->source.words[2] = bpf_htonl(0xffff);
	packet->source.words[3] = ip->saddr;
	packet->destination.words[0] = packet->destination.words[1] = 0;
	packet->destination.words[2] = bpf_htonl(0xffff);
	packet->destination.words[3] = ip->daddr;
	return LBH_HANDSHAKE;
}

static __always_inline int lbh_parse_ipv6(struct lbh_context context, bool datagrams, u32 offset,
					  struct lbh_packet *packet)
{
	struct ipv6hdr buffer, *ip = lbh_header(context, offset, &buffer, sizeof(buffer));
	struct lbh_extent extent;
	u8 next;
	int i;

	if (!ip)
		return LBH_PARSE_TRUNCATED;
	if (ip->version != 6)
		return LBH_OTHER;
	packet->source = *(struct lbh_address *)&ip->saddr;
	packet->destination = *(struct lbh_address *)&ip->daddr;
	next = ip->nexthdr;
	offset += sizeof(*ip);
	/* A length of zero before options may be a jumbogram (RFC 2675): all that is there. */
	extent.end =
		ip->payload_len || next != IPPROTO_HOPOPTS ? offset + bpf_ntohs(ip->payload_len) : lbh_length(context);
	extent.continued = false;
#pragma unroll
	for (i = 0; i <= LBH_EXTENSION_HEADERS; i++) {
		struct lbh_extension copy, *extension;

		if (!lbh_wants(datagrams, next) && next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return LBH_OTHER;
		if (offset > LBH_MAX_OFFSET)
			return LBH_PARSE_EXTENSION;
		if (lbh_wants(datagrams, next))
			return lbh_parse_transport(context, datagrams, &extent, offset, next, packet);
		if (i == LBH_EXTENSION_HEADERS)
			return LBH_PARSE_EXTENSION;
		extension = lbh_header(context, offset, &copy, sizeof(copy));
		if (!extension)
			return LBH_PARSE_TRUNCATED;
		if (next == IPPROTO_FRAGMENT) {
			if (extension->offset_flags & bpf_htons(0xfff8))
				return lbh_wants(datagrams, extension->next) ? LBH_PARSE_FRAGMENT : LBH_OTHER;
			extent.continued |= (extension->offset_flags & bpf_htons(1)) != 0;
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (extension->length + 2) * 4; /* RFC 4302, 2.2 */
		} else {
			offset += (extension->length + 1) * 8;
		}
		next = extension->next;
	}
	return LBH_PARSE_EXTENSION;
}

/*
 * Whether a packet is of no interest at a glance: a few instructions for what nearly all traffic is, plain IP that is
 * no TCP, and whole TCP segments without the flags of a handshake. What it does not know it leaves to lbh_parse.
 */
static __always_inline bool lbh_is_dull(struct lbh_context context, bool ethernet, bool ingress)
{
	u8 *data = lbh_data(context), *end = lbh_data_end(context), flags;
	u8 *ip = data + (ethernet ? ETH_HLEN : 0);
	u16 ethertype;

	if (ip + sizeof(struct iphdr) + sizeof(struct tcphdr) > end)
		return false;
	ethertype = ethernet ? *(u16 *)(data + 2 * ETH_ALEN) : lbh_protocol(context);
	if (ethertype == bpf_htons(ETH_P_IP)) {
		struct iphdr *header = (void *)ip;

		if (header->protocol != IPPROTO_TCP)
			return true;
		if (ip[0] != 0x45 || header->frag_off & bpf_htons(0x1fff))
			return false;
		flags = ip[sizeof(*header) + 13];
		/* Two reads at two fixed offsets, not one at an offset that is chosen: see lbh_header. */
		asm volatile("# IPv4" : "+r"(flags));
	} else if (ethertype == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *header = (void *)ip;

		if (ip + sizeof(*header) + sizeof(struct tcphdr) > end || header->nexthdr != IPPROTO_TCP)
			return false;
		flags = ip[sizeof(*header) + 13];
		asm volatile("# IPv6" : "+r"(flags));
	} else {
		return false;
	}
	if (ingress)
		return (flags & (LBH_TCP_SYN | LBH_TCP_ACK | LBH_TCP_RST | LBH_TCP_FIN)) != LBH_TCP_SYN;
	return !(flags & (LBH_TCP_SYN | LBH_TCP_RST));
}

/*
 * Fills in what nearly every handshake is, after lbh_is_dull has let it pass: TCP in IPv4 without options, tags and
 * fragments, all in the linear part, of lengths that are right. False for all else, which is lbh_parse's.
 */
static __always_inline bool lbh_parse_plain(struct lbh_context context, bool ethernet, struct lbh_packet *packet)
{
	u8 *data = lbh_data(context), *end = lbh_data_end(context);
	u32 offset = ethernet ? ETH_HLEN : 0, length, headers;
	struct iphdr *ip = (void *)(data + offset);
	struct tcphdr *tcp = (void *)(ip + 1);

	if ((void *)(tcp + 1) > (void *)end ||
	    (ethernet ? *(u16 *)(data + 2 * ETH_ALEN) : lbh_protocol(context)) != bpf_htons(ETH_P_IP) ||
	    *(u8 *)ip != 0x45 || ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(0x3fff))
		return false;
	length = bpf_ntohs(ip->tot_len);
	headers = sizeof(*ip) + tcp->doff * 4;
	if (tcp->doff < 5 || headers > length || offset + length > lbh_length(context))
		return false;
	packet->source.words[2] = packet->destination.words[2] = bpf_htonl(0xffff);
	packet->source.words[3] = ip->saddr;
	packet->destination.words[3] = ip->daddr;
	packet->source_port = tcp->source;
	packet->destination_port = tcp->dest;
	packet->sequence = bpf_ntohl(tcp->seq);
	packet->acknowledgment = bpf_ntohl(tcp->ack_seq);
	packet->data_length = length - headers;
	packet->flags = ((u8 *)tcp)[13];
	return true;
}

/*
 * Parses a packet. ethernet: the device has an Ethernet header (else data starts at the IP
 * header, as on ipip, wireguard and tun). Tags in the frame are followed; a tag in the skb's metadata is no
 * part of the data, and skb->protocol then already names what follows it.
 */
static __always_inline int lbh_parse(struct lbh_context context, bool ethernet, bool datagrams,
				     struct lbh_packet *packet)
{
	u16 ethertype = lbh_protocol(context);
	u32 offset = 0;
	int i;

	if (ethernet) {
		struct ethhdr buffer, *frame = lbh_header(context, 0, &buffer, sizeof(buffer));

		if (!frame)
			return LBH_OTHER;
		ethertype = frame->h_proto;
		offset = sizeof(*frame);
#pragma unroll
		for (i = 0; i < LBH_VLAN_TAGS; i++) {
			struct lbh_vlan_tag copy, *tag;

			if (ethertype != bpf_htons(ETH_P_8021Q) && ethertype != bpf_htons(ETH_P_8021AD))
				break;
			tag = lbh_header(context, offset, &copy, sizeof(copy));
			if (!tag)
				return LBH_PARSE_TRUNCATED;
			ethertype = tag->ethertype;
			offset += sizeof(*tag);
		}
	}
	if (ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD))
		return LBH_PARSE_EXTENSION;
	if (ethertype == bpf_htons(ETH_P_IP))
		return lbh_parse_ipv4(context, datagrams, offset, packet);
	if (ethertype == bpf_htons(ETH_P_IPV6))
		return lbh_parse_ipv6(context, datagrams, offset, packet);
	return LBH_OTHER;
}

#endif
