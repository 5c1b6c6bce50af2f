/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * From a message of ctnetlink to the tuples of a new connection (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
 * Reads only, takes any bytes: what is not as the kernel writes it (ctnetlink_conntrack_event and ctnetlink_dump_tuples
 * in net/netfilter/nf_conntrack_netlink.c; one message in an skb) is told as not read, never guessed.
 */
#ifndef LBH_CONNTRACK_H
#define LBH_CONNTRACK_H

#include <linux/in.h>
#include <linux/netlink.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>

/* AF_INET and AF_INET6: UAPI has no header with them. */
#define LBH_IPV4 2
#define LBH_IPV6 10
/* CTA_TUPLE_ORIG is the first attribute, CTA_TUPLE_REPLY the next; zones and the like may come to stand between. */
#define LBH_CT_ATTRIBUTES 8

enum lbh_ct_read {
	LBH_CT_READ,
	LBH_CT_OTHER, /* whole, but not about a new connection of a transport with ports */
	LBH_CT_UNREAD,
};

struct lbh_ct_head {
	struct nlmsghdr message;
	struct nfgenmsg netfilter;
};

/* Where the reading of a message has got to. */
struct lbh_ct_message {
	u32 offset;
	u8 family;
	u8 listed; /* 1: about an entry that was asked for, not about a new one */
};

struct lbh_tuple {
	struct lbh_address source;
	struct lbh_address destination;
	u16 source_port;
	u16 destination_port;
	u8 transport;
};

struct lbh_ct_ipv4 {
	struct nlattr nest; /* CTA_TUPLE_IP */
	struct nlattr source_is;
	u32 source;
	struct nlattr destination_is;
	u32 destination;
};

struct lbh_ct_ipv6 {
	struct nlattr nest; /* CTA_TUPLE_IP */
	struct nlattr source_is;
	struct lbh_address source;
	struct nlattr destination_is;
	struct lbh_address destination;
};

struct lbh_ct_transport {
	struct nlattr nest; /* CTA_TUPLE_PROTO */
	struct nlattr number_is;
	u8 number;
	u8 number_pad[3];
	struct nlattr source_is;
	u16 source;
	u8 source_pad[2];
	struct nlattr destination_is;
	u16 destination;
	u8 destination_pad[2];
};

/* Zero if an attribute is of this type and has so many bytes behind its header. */
static __always_inline u32 lbh_ct_wrong(const struct nlattr *attribute, u16 type, u16 size)
{
	return ((attribute->nla_type & NLA_TYPE_MASK) ^ type) | (attribute->nla_len ^ (NLA_HDRLEN + size));
}

static __always_inline int lbh_ct_begin(struct __sk_buff *skb, struct lbh_ct_message *message)
{
	struct lbh_ct_head head;

	if (bpf_skb_load_bytes(skb, 0, &head, sizeof(head)))
		return LBH_CT_UNREAD;
	/* A change, or an entry that a program put in (conntrackd at a fail-over): it has that program's port id. */
	if (head.message.nlmsg_type != (NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW) ||
	    (head.message.nlmsg_flags & (NLM_F_CREATE | NLM_F_EXCL)) != (NLM_F_CREATE | NLM_F_EXCL) ||
	    head.message.nlmsg_pid)
		return LBH_CT_OTHER;
	if (head.message.nlmsg_len != skb->len)
		return LBH_CT_UNREAD;
	if (head.netfilter.nfgen_family != LBH_IPV4 && head.netfilter.nfgen_family != LBH_IPV6)
		return LBH_CT_OTHER;
	message->offset = sizeof(head);
	message->family = head.netfilter.nfgen_family;
	/* The kernel marks so only parts of an answer; the agent hands them on as if they were news. */
	message->listed = !!(head.message.nlmsg_flags & NLM_F_MULTI);
	return LBH_CT_READ;
}

/* Reads the addresses; answers how many bytes they take with their headers, 0 if they are not as they should be. */
static __always_inline u32 lbh_ct_addresses(struct __sk_buff *skb, u32 offset, u8 family, struct lbh_tuple *tuple)
{
	if (family == LBH_IPV4) {
		struct lbh_ct_ipv4 ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) ||
		    lbh_ct_wrong(&ip.nest, CTA_TUPLE_IP, sizeof(ip) - NLA_HDRLEN) |
			    lbh_ct_wrong(&ip.source_is, CTA_IP_V4_SRC, sizeof(ip.source)) |
			    lbh_ct_wrong(&ip.destination_is, CTA_IP_V4_DST, sizeof(ip.destination)))
			return 0;
		tuple->source.words[0] = tuple->source.words[1] = 0;
		tuple->source.words[2] = bpf_htonl(0xffff);
		tuple->source.words[3] = ip.source;
		tuple->destination.words[0] = tuple->destination.words[1] = 0;
		tuple->destination.words[2] = bpf_htonl(0xffff);
		tuple->destination.words[3] = ip.destination;
		return sizeof(ip);
	} else {
		struct lbh_ct_ipv6 ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) ||
		    lbh_ct_wrong(&ip.nest, CTA_TUPLE_IP, sizeof(ip) - NLA_HDRLEN) |
			    lbh_ct_wrong(&ip.source_is, CTA_IP_V6_SRC, sizeof(ip.source)) |
			    lbh_ct_wrong(&ip.destination_is, CTA_IP_V6_DST, sizeof(ip.destination)))
			return 0;
		tuple->source = ip.source;
		tuple->destination = ip.destination;
		return sizeof(ip);
	}
}

/* Reads a tuple of which size bytes stand at offset. */
static __always_inline int lbh_ct_tuple(struct __sk_buff *skb, u32 offset, u32 size, u8 family, struct lbh_tuple *tuple)
{
	u32 ip_size = lbh_ct_addresses(skb, offset, family, tuple);
	struct lbh_ct_transport transport;

	if (!ip_size || bpf_skb_load_bytes(skb, offset + ip_size, &transport, sizeof(transport)) ||
	    lbh_ct_wrong(&transport.number_is, CTA_PROTO_NUM, sizeof(transport.number)) ||
	    (transport.nest.nla_type & NLA_TYPE_MASK) != CTA_TUPLE_PROTO)
		return LBH_CT_UNREAD;
	if (transport.number != IPPROTO_TCP && transport.number != IPPROTO_UDP && transport.number != IPPROTO_SCTP)
		return LBH_CT_OTHER;
	/* In CTA_TUPLE_PROTO and in the tuple there may be more behind it: of a tuple, its zone. */
	if (lbh_ct_wrong(&transport.source_is, CTA_PROTO_SRC_PORT, sizeof(transport.source)) |
		    lbh_ct_wrong(&transport.destination_is, CTA_PROTO_DST_PORT, sizeof(transport.destination)) ||
	    transport.nest.nla_len < sizeof(transport) || size < ip_size + transport.nest.nla_len)
		return LBH_CT_UNREAD;
	tuple->source_port = transport.source;
	tuple->destination_port = transport.destination;
	tuple->transport = transport.number;
	return LBH_CT_READ;
}

/* Goes on to the tuple of this type (CTA_TUPLE_ORIG or CTA_TUPLE_REPLY) and reads it. */
static __always_inline int lbh_ct_find_tuple(struct __sk_buff *skb, struct lbh_ct_message *message, u16 type,
					     struct lbh_tuple *tuple)
{
	u32 i, offset = message->offset;

	LBH_LOOP
	for (i = 0; i < LBH_CT_ATTRIBUTES; i++) {
		struct nlattr attribute;

		if (bpf_skb_load_bytes(skb, offset, &attribute, sizeof(attribute)) || attribute.nla_len < NLA_HDRLEN ||
		    attribute.nla_len > skb->len - offset)
			break;
		message->offset = offset + NLA_ALIGN(attribute.nla_len);
		if ((attribute.nla_type & NLA_TYPE_MASK) == type)
			return lbh_ct_tuple(skb, offset + NLA_HDRLEN, attribute.nla_len - NLA_HDRLEN, message->family,
					    tuple);
		offset = message->offset;
	}
	return LBH_CT_UNREAD;
}

#define LBH_CT_ZONE_SIZE NLA_ALIGN(NLA_HDRLEN + sizeof(u16))

struct lbh_ct_id {
	struct nlattr is;
	u32 id;
};

/* The entry's id, which is the next behind its tuples but for a zone; 0 if it has none. */
static __always_inline u32 lbh_ct_find_id(struct __sk_buff *skb, const struct lbh_ct_message *message)
{
	u32 offset = message->offset;
	struct lbh_ct_id attribute;

	if (bpf_skb_load_bytes(skb, offset, &attribute, sizeof(attribute)))
		return 0;
	if ((attribute.is.nla_type & NLA_TYPE_MASK) == CTA_ZONE &&
	    bpf_skb_load_bytes(skb, offset + LBH_CT_ZONE_SIZE, &attribute, sizeof(attribute)))
		return 0;
	return lbh_ct_wrong(&attribute.is, CTA_ID, sizeof(attribute.id)) ? 0 : attribute.id;
}

#endif
