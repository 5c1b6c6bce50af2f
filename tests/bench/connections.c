// SPDX-License-Identifier: Apache-2.0
/*
 * Connections one after another, as fast as one core makes them.
 *
 *   connections serve PORT                      accept, wait for the end, close; until killed
 *   connections call ADDRESS PORT MILLISECONDS  connect, reset, again; prints "made failed nanoseconds"
 *
 * IPv4. Each connection is ended by a reset, so that no port waits in TIME_WAIT.
 */
#include <arpa/inet.h>
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

static int call(const char *host, int port, long milliseconds)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct timeval patience = {.tv_usec = 300000};
	struct linger reset = {.l_onoff = 1};
	long made = 0, failed = 0;
	long long start = now_ns(), end = start + milliseconds * 1000000;

	if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
		fprintf(stderr, "not an IPv4 address: %s\n", host);
		return 1;
	}
	while (now_ns() < end) {
		int connection = socket(AF_INET, SOCK_STREAM, 0);

		setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
		if (connect(connection, (void *)&address, sizeof(address)))
			failed++;
		else
			made++;
		setsockopt(connection, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(connection);
	}
	printf("%ld %ld %lld\n", made, failed, now_ns() - start);
	return 0;
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "serve"))
		return serve(atoi(words[2]));
	if (count == 5 && !strcmp(words[1], "call"))
		return call(words[2], atoi(words[3]), atol(words[4]));
	fprintf(stderr, "usage: %s serve PORT | call ADDRESS PORT MILLISECONDS\n", words[0]);
	return 2;
}
