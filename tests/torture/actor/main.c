/* The actor of the torture tests: does in a guest what the host says, and tells what it saw.
 *
 * Usage: actor DIRECTORY PORT CONTEXTS. Paths are relative to DIRECTORY. A request (struct request, then actions) is
 * for one context, a thread that does its actions in order and then sends one reply (struct reply, then a result for
 * each action). Context 65535 in a reply: only the count of consumed bytes. The host never has more bytes under way
 * than a serial line of User-Mode Linux holds, so it must be told early what was taken. Such a line also forgets now
 * and then to tell that something came, until something else comes: that is what a request for context 65535 is for.
 */
#include "actor.h"

#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/resource.h>
#include <termios.h>
#include <time.h>

enum { LONGEST_REQUEST = 2048, MOST_ACTIONS = 64, CREDIT = 512, NOBODY = 65535 };

struct worker {
	struct context context;
	pthread_t thread;
	sem_t wanted;
	uint16_t number, size;
	char request[LONGEST_REQUEST];
};

static int port;
static pthread_mutex_t port_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t consumed, told; /* told: under port_lock */

static void fail(const char *what)
{
	fprintf(stderr, "actor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void wait_for(short events)
{
	struct pollfd p = { .fd = port, .events = events };
	poll(&p, 1, 10); /* a virtio port is always "ready" with EOF while the host is away */
}

static void read_all(void *buffer, size_t size)
{
	for (char *at = buffer; size;) {
		ssize_t n = read(port, at, size);
		if (n > 0) {
			at += n;
			size -= n;
			__atomic_add_fetch(&consumed, n, __ATOMIC_RELAXED);
		} else if (n == 0 || errno == EAGAIN || errno == EINTR) {
			wait_for(POLLIN);
		} else {
			fail("read");
		}
	}
}

static void send_reply(uint16_t context, const struct result *results, int count)
{
	char frame[sizeof(struct reply) + MOST_ACTIONS * sizeof(struct result)];
	struct reply reply = { .size = count * sizeof(struct result), .context = context };
	size_t size = sizeof(reply) + reply.size;
	pthread_mutex_lock(&port_lock);
	reply.consumed = told = __atomic_load_n(&consumed, __ATOMIC_RELAXED);
	memcpy(frame, &reply, sizeof(reply));
	memcpy(frame + sizeof(reply), results, reply.size);
	for (char *at = frame; size;) {
		ssize_t n = write(port, at, size);
		if (n > 0) {
			at += n;
			size -= n;
		} else if (n == 0 || errno == EAGAIN || errno == EINTR) {
			wait_for(POLLOUT);
		} else {
			fail("write");
		}
	}
	pthread_mutex_unlock(&port_lock);
}

static uint64_t microseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

static int64_t field_of(const struct result *result, enum field field)
{
	const int64_t fields[] = {
		[ERROR] = result->error, [INODE] = result->inode, [MODE] = result->mode, [LINKS] = result->links,
		[SIZE] = result->size,	 [MTIME] = result->mtime, [CONTENT] = result->content,
	};
	return field <= CONTENT ? fields[field] : 0;
}

static void execute(struct worker *worker, const struct action *action, const char *path, const char *other,
		    struct result *result)
{
	uint64_t start = microseconds(), end = start + action->flags * 1000ull;
	if (action->kind < OBSERVATIONS) {
		change(&worker->context, action, path, other, result);
	} else {
		do {
			*result = (struct result){ 0 };
			observe(&worker->context, action, path, result);
		} while (action->kind & WATCH && field_of(result, action->slot) == action->value && microseconds() < end);
	}
	result->microseconds = microseconds() - start;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	for (;;) {
		struct result results[MOST_ACTIONS] = { 0 };
		int count = 0;
		while (sem_wait(&worker->wanted))
			;
		for (char *at = worker->request, *end = at + worker->size; at < end && count < MOST_ACTIONS; count++) {
			struct action action;
			memcpy(&action, at, sizeof(action));
			char *path = at + sizeof(action), *other = path + strlen(path) + 1;
			execute(worker, &action, path, other, &results[count]);
			at = other + strlen(other) + 1;
		}
		send_reply(worker->number, results, count);
	}
	return NULL;
}

/* Each context holds files open. */
static void allow_descriptors(int contexts)
{
	rlim_t most = 64 + (rlim_t)contexts * (HELD_FILES + 2);
	if (most > 1024 && setrlimit(RLIMIT_NOFILE, &(struct rlimit){ most, most }))
		fail("setrlimit");
}

static struct worker *start_workers(int count)
{
	struct worker *workers = calloc(count, sizeof(*workers));
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	for (int i = 0; i < count; i++) {
		workers[i].number = i;
		memset(workers[i].context.held, -1, sizeof(workers[i].context.held));
		sem_init(&workers[i].wanted, 0, 0);
		if (pthread_create(&workers[i].thread, &attributes, work, &workers[i]))
			fail("pthread_create");
	}
	return workers;
}

static void open_port(const char *path)
{
	port = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (port < 0)
		fail(path);
	struct termios raw;
	if (tcgetattr(port, &raw) == 0) {
		cfmakeraw(&raw);
		tcsetattr(port, TCSANOW, &raw);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: actor DIRECTORY PORT CONTEXTS\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	umask(022);
	if (chdir(argv[1]))
		fail(argv[1]);
	int count = atoi(argv[3]);
	allow_descriptors(count);
	struct worker *workers = start_workers(count);
	open_port(argv[2]);
	send_reply(NOBODY, NULL, 0);
	for (;;) {
		struct request request;
		read_all(&request, sizeof(request));
		if (request.context == NOBODY) { /* a nudge */
			send_reply(NOBODY, NULL, 0);
			continue;
		}
		if (request.context >= count || request.size > LONGEST_REQUEST) {
			errno = EPROTO;
			fail("requests out of step");
		}
		struct worker *worker = &workers[request.context];
		read_all(worker->request, request.size);
		worker->size = request.size;
		sem_post(&worker->wanted);
		pthread_mutex_lock(&port_lock);
		int due = consumed - told >= CREDIT;
		pthread_mutex_unlock(&port_lock);
		if (due)
			send_reply(NOBODY, NULL, 0);
	}
}
