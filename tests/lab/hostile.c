// SPDX-License-Identifier: Apache-2.0
/*
 * Packets that nobody in his right mind sends: forged TCP segments and UDP datagrams, put on an interface as they are.
 *
 *   hostile INTERFACE MAC tcp|udp SOURCE PORT DESTINATION PORT SEQUENCE ACKNOWLEDGMENT FLAGS COUNT RATE SEED
 *
 * SOURCE is an address, or a prefix (198.18.0.0/15): then each packet has an address of its own out of it, while there
 * are any left. A port or number is one number, * (another one in each packet), or, for a port, + (1, 2, 3 ...). What
 * is by chance is so by SEED alone. MAC is the next hop's. IPv4 and IPv6, all checksums right. Sends COUNT packets (at
 * most 1,000,000), RATE a second (at most 200,000), and prints "sent nanoseconds": what the kernel took.
 *
 * Runs in the namespaces of a laboratory only (/run/netns/lbh-*).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <glob.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1000000, FASTEST = 200000, BATCH = 64, LARGEST = 128 };

/* A field of the packet: one number, by chance, or counting. */
struct field {
	char kind; /* 0, '*' or '+' */
	uint32_t number;
};

struct plan {
	int family, protocol;
	uint8_t source[16], destination[16];
	int prefix;
	struct field source_port, port, sequence, acknowledgment;
	uint8_t flags;
	uint64_t seed;
	struct ether_header frame;
};

static int fail(const char *what)
{
	fprintf(stderr, "hostile: %s\n", what);
	return 2;
}

static long long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ll + time.tv_nsec;
}

/* splitmix64 */
static uint64_t draw(uint64_t *state)
{
	uint64_t value = *state += 0x9e3779b97f4a7c15ull;

	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
	value = (value ^ value >> 27) * 0x94d049bb133111ebull;
	return value ^ value >> 31;
}

static uint32_t value_of(const struct field *field, uint64_t random, uint32_t number)
{
	return field->kind == '*' ? random : field->kind == '+' ? number + 1 : field->number;
}

static uint32_t sum_of(const void *data, size_t size, uint32_t sum)
{
	const uint8_t *bytes = data;
	size_t i;

	for (i = 0; i < size; i++)
		sum += i & 1 ? bytes[i] : bytes[i] << 8;
	return sum;
}

static uint16_t checksum(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons(~sum);
}

/* The lowest bits of the address, up to 32, become another number for each packet: an odd factor loses none. */
static void choose_source(const struct plan *plan, uint32_t number, uint8_t *address)
{
	int length = plan->family == AF_INET ? 4 : 16, free = length * 8 - plan->prefix;
	uint32_t mask = free >= 32 ? 0xffffffff : (1u << free) - 1, last;

	memcpy(address, plan->source, length);
	memcpy(&last, address + length - 4, 4);
	last = htonl((ntohl(last) & ~mask) | ((number * 2654435761u + (uint32_t)plan->seed) & mask));
	memcpy(address + length - 4, &last, 4);
}

static size_t build(const struct plan *plan, uint32_t number, uint64_t *state, uint8_t *packet)
{
	size_t size = plan->protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : sizeof(struct udphdr);
	size_t head = plan->family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ip6_hdr);
	uint8_t *ip = packet + sizeof(plan->frame), *transport = ip + head, *addresses;
	uint64_t ports = draw(state), numbers = draw(state);
	uint16_t source_port =
		htons(plan->source_port.kind == '*' ? 1024 + ports % 64512 : value_of(&plan->source_port, 0, number));
	uint16_t port = htons(value_of(&plan->port, ports >> 32, number));
	uint32_t sum;

	memset(packet, 0, LARGEST);
	memcpy(packet, &plan->frame, sizeof(plan->frame));
	if (plan->family == AF_INET) {
		struct iphdr *header = (void *)ip;

		*header = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = plan->protocol};
		header->tot_len = htons(head + size);
		choose_source(plan, number, (void *)&header->saddr);
		memcpy(&header->daddr, plan->destination, 4);
		header->check = checksum(sum_of(header, head, 0));
		addresses = (void *)&header->saddr;
	} else {
		struct ip6_hdr *header = (void *)ip;

		header->ip6_flow = htonl(6u << 28);
		header->ip6_plen = htons(size);
		header->ip6_nxt = plan->protocol;
		header->ip6_hlim = 64;
		choose_source(plan, number, (void *)&header->ip6_src);
		memcpy(&header->ip6_dst, plan->destination, 16);
		addresses = (void *)&header->ip6_src;
	}
	sum = sum_of(addresses, plan->family == AF_INET ? 8 : 32, plan->protocol + size);
	if (plan->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = (void *)transport;

		tcp->source = source_port;
		tcp->dest = port;
		tcp->seq = htonl(value_of(&plan->sequence, numbers, number));
		tcp->ack_seq = htonl(value_of(&plan->acknowledgment, numbers >> 32, number));
		tcp->doff = 5;
		transport[13] = plan->flags;
		tcp->window = htons(64240);
		tcp->check = checksum(sum_of(transport, size, sum));
	} else {
		struct udphdr *udp = (void *)transport;

		udp->source = source_port;
		udp->dest = port;
		udp->len = htons(size);
		udp->check = checksum(sum_of(transport, size, sum));
		if (!udp->check)
			udp->check = 0xffff;
	}
	return sizeof(plan->frame) + head + size;
}

/* Sends everything; answers how many packets the kernel took, which is all of them unless the interface went down. */
static long send_all(int fd, const struct plan *plan, long count, long rate)
{
	static uint8_t packets[BATCH][LARGEST];
	struct iovec parts[BATCH];
	struct mmsghdr messages[BATCH];
	uint64_t state = plan->seed;
	long long start = now_ns();
	long sent = 0;

	while (sent < count) {
		long long due = start + sent * 1000000000ll / rate;
		struct timespec time = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000};
		int made = 0, done = 0;

		for (; made < BATCH && sent + made < count; made++) {
			parts[made].iov_base = packets[made];
			parts[made].iov_len = build(plan, sent + made, &state, packets[made]);
			messages[made] = (struct mmsghdr){.msg_hdr = {.msg_iov = &parts[made], .msg_iovlen = 1}};
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
		while (done < made) {
			int taken = sendmmsg(fd, messages + done, made - done, 0);

			if (taken > 0)
				done += taken;
			else if (errno == ENOBUFS || errno == EAGAIN)
				usleep(1000); /* the receiver's queue is full: this packet was not taken */
			else if (errno != EINTR)
				return sent + done;
		}
		sent += done;
	}
	return sent;
}

/* Whether this is a namespace of a laboratory, by the names that `ip netns` knows. */
static int is_in_a_lab(void)
{
	struct stat here, lab;
	size_t i, found = 0;
	glob_t names;

	if (stat("/proc/self/ns/net", &here) || glob("/run/netns/lbh-*", 0, NULL, &names))
		return 0;
	for (i = 0; i < names.gl_pathc; i++)
		found += !stat(names.gl_pathv[i], &lab) && lab.st_dev == here.st_dev && lab.st_ino == here.st_ino;
	globfree(&names);
	return found > 0;
}

static int read_field(const char *word, const char *kinds, uint64_t most, struct field *field)
{
	char *end;
	uint64_t number;

	*field = (struct field){0};
	if (word[0] && !word[1] && strchr(kinds, word[0])) {
		field->kind = word[0];
		return 0;
	}
	number = strtoull(word, &end, 10);
	field->number = number;
	return !*word || *end || number > most;
}

static int read_source(char *word, struct plan *plan)
{
	char *slash = strchr(word, '/');
	int bits = plan->family == AF_INET ? 32 : 128;

	plan->prefix = slash ? atoi(slash + 1) : bits;
	if (slash)
		*slash = 0;
	return inet_pton(plan->family, word, plan->source) != 1 || plan->prefix < 0 || plan->prefix > bits;
}

static int open_interface(const char *name, struct plan *plan)
{
	struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(name)};
	struct ifreq request = {0};
	int fd = socket(AF_PACKET, SOCK_RAW, 0);

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request) || bind(fd, (void *)&place, sizeof(place)))
		return -1;
	memcpy(plan->frame.ether_shost, request.ifr_hwaddr.sa_data, ETH_ALEN);
	return fd;
}

int main(int words_count, char **words)
{
	struct plan plan = {0};
	struct field flags, count, rate, seed;
	uint8_t *mac = plan.frame.ether_dhost;
	long long start;
	long sent;
	int fd;

	if (words_count != 14)
		return fail("INTERFACE MAC tcp|udp SOURCE PORT DESTINATION PORT SEQUENCE ACKNOWLEDGMENT FLAGS COUNT "
			    "RATE SEED");
	if (!is_in_a_lab())
		return fail("runs in a laboratory only");
	plan.family = strchr(words[6], ':') ? AF_INET6 : AF_INET;
	plan.protocol = strcmp(words[3], "udp") ? IPPROTO_TCP : IPPROTO_UDP;
	plan.frame.ether_type = htons(plan.family == AF_INET ? ETHERTYPE_IP : ETHERTYPE_IPV6);
	if (sscanf(words[2], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6)
		return fail("not a MAC address");
	if (read_source(words[4], &plan) || inet_pton(plan.family, words[6], plan.destination) != 1)
		return fail("source and destination are addresses of one family");
	if (read_field(words[5], "*+", 65535, &plan.source_port) || read_field(words[7], "*+", 65535, &plan.port) ||
	    read_field(words[8], "*", 0xffffffff, &plan.sequence) ||
	    read_field(words[9], "*", 0xffffffff, &plan.acknowledgment) || read_field(words[10], "", 255, &flags))
		return fail("a port, number or flag is wrong");
	if (read_field(words[11], "", MOST, &count) || read_field(words[12], "", FASTEST, &rate) || !rate.number ||
	    read_field(words[13], "", 0xffffffff, &seed))
		return fail("at most 1,000,000 packets, 1 to 200,000 a second");
	plan.flags = flags.number;
	plan.seed = seed.number;
	fd = open_interface(words[1], &plan);
	if (fd < 0)
		return fail("no such interface, or not allowed");
	start = now_ns();
	sent = send_all(fd, &plan, count.number, rate.number);
	printf("%ld %lld\n", sent, now_ns() - start);
	return sent != count.number;
}
