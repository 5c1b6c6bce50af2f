// SPDX-License-Identifier: Apache-2.0
/*
 * Connections one after another, as fast as one core makes them.
 *
 *   connections serve PORT                      accept, wait for the end, close; until killed
 *   connections call ADDRESS PORT MILLISECONDS [RATE]
 *                                               connect, reset, again, RATE times a second or as fast as it goes;
 *                                               prints "made failed nanoseconds"
 *   connections compare NETNS NETNS ADDRESS PORT COUNT TURNS
 *                                               COUNT connections in the one namespace, as many in the other, and so on
 *                                               in changing order; prints "nanoseconds nanoseconds" for each turn
 *
 * IPv4. Each connection is ended by a reset, so that no port waits in TIME_WAIT.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static int serve(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	char byte;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (void *)&address, sizeof(address)) || listen(listener, 4096)) {
		perror("listen");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int connection = accept(listener, NULL, NULL);

		if (connection < 0)
			continue;
		while (read(connection, &byte, 1) > 0)
			;
		close(connection);
	}
}

static int connect_once(const struct sockaddr_in *address)
{
	struct timeval patience = {.tv_usec = 300000};
	struct linger reset = {.l_onoff = 1};
	int connection = socket(AF_INET, SOCK_STREAM, 0), failed;

	setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	failed = connect(connection, (const void *)address, sizeof(*address));
	setsockopt(connection, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(connection);
	return failed;
}

static int read_address(const char *host, int port, struct sockaddr_in *address)
{
	*address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
	if (inet_pton(AF_INET, host, &address->sin_addr) == 1)
		return 0;
	fprintf(stderr, "not an IPv4 address: %s\n", host);
	return -1;
}

/* Waits until so many connections are due at this rate; wakes up late by less than their number shows. */
static void pace(long long start, long made, long rate)
{
	long long due = start + made * 1000000000ll / rate;
	struct timespec time = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000};

	if (now_ns() < due)
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

static int call(const char *host, int port, long milliseconds, long rate)
{
	struct sockaddr_in address;
	long made = 0, failed = 0;
	long long start = now_ns(), end = start + milliseconds * 1000000;

	if (read_address(host, port, &address))
		return 1;
	while (now_ns() < end) {
		if (rate)
			pace(start, made + failed, rate);
		if (connect_once(&address))
			failed++;
		else
			made++;
	}
	printf("%ld %ld %lld\n", made, failed, now_ns() - start);
	return 0;
}

static int compare(char **namespaces, const char *host, int port, int count, int turns)
{
	struct sockaddr_in address;
	int fds[2], turn, side, i;

	if (read_address(host, port, &address))
		return 1;
	for (i = 0; i < 2; i++) {
		fds[i] = open(namespaces[i], O_RDONLY);
		if (fds[i] < 0) {
			perror(namespaces[i]);
			return 1;
		}
	}
	for (turn = 0; turn < turns; turn++) {
		long long took[2];

		for (side = 0; side < 2; side++) {
			int which = side ^ (turn & 1);
			long long start;

			if (setns(fds[which], CLONE_NEWNET)) {
				perror("setns");
				return 1;
			}
			/* The first is not counted: it brings this side's memory back into the cache. */
			for (i = 0; i <= count; i++) {
				if (i == 1)
					start = now_ns();
				if (connect_once(&address)) {
					perror("connect");
					return 1;
				}
			}
			took[which] = now_ns() - start;
		}
		printf("%lld %lld\n", took[0], took[1]);
	}
	return 0;
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "serve"))
		return serve(atoi(words[2]));
	if ((count == 5 || count == 6) && !strcmp(words[1], "call"))
		return call(words[2], atoi(words[3]), atol(words[4]), count == 6 ? atol(words[5]) : 0);
	if (count == 8 && !strcmp(words[1], "compare"))
		return compare(words + 2, words[4], atoi(words[5]), atoi(words[6]), atoi(words[7]));
	fprintf(stderr, "usage: %s serve PORT | call ADDRESS PORT MILLISECONDS [RATE] | compare ...\n", words[0]);
	return 2;
}
