/* Process 1 of a laboratory guest: runs shell commands that come over a port and returns output and status.
 *
 * Usage: agent PORT. Frames in both directions: u32 magic, u32 kind, u32 length (little-endian), payload.
 * The host sends the pieces of a shell script (SCRIPT) and of its standard input (INPUT), then RUN; while it runs
 * only KILL may follow. The guest answers with OUTPUT frames (standard output and error together) and one EXIT
 * (u32 wait status). Each piece is acknowledged (ACK) before the next is sent, and is small: User-Mode Linux stops
 * receiving for ever after its serial line's buffer of 4096 bytes was full.
 * A HELLO is sent when the agent is ready, so a second HELLO tells of a reboot. tests/lab/agent.py is the host's side.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAGIC = 0x42414c56, HELLO = 1, INPUT = 2, RUN = 3, KILL = 4, OUTPUT = 5, EXIT = 6, SCRIPT = 7, ACK = 8 };

struct header {
	uint32_t magic, kind, length;
};

static int port;

static void fail(const char *what)
{
	fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
	exit(1); /* process 1 has ended: the kernel panics, and the laboratory reports it with the console */
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
		} else if (n == 0 || errno == EAGAIN || errno == EINTR) {
			wait_for(POLLIN);
		} else {
			fail("read");
		}
	}
}

static void write_all(const void *buffer, size_t size)
{
	for (const char *at = buffer; size;) {
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
}

static void send_frame(uint32_t kind, const void *payload, uint32_t length)
{
	struct header header = { MAGIC, kind, length };
	write_all(&header, sizeof(header));
	write_all(payload, length);
}

static int new_piece_file(void)
{
	int fd = memfd_create("pieces", MFD_CLOEXEC);
	if (fd < 0)
		fail("memfd_create");
	return fd;
}

static void take_piece(int file, uint32_t length)
{
	char piece[4096];
	if (length > sizeof(piece))
		fail("piece too long");
	read_all(piece, length);
	if (write(file, piece, length) != (ssize_t)length)
		fail("no room for a piece");
	send_frame(ACK, NULL, 0);
}

static pid_t start(int script, int input, int *output)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC))
		fail("pipe");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		off_t length = lseek(script, 0, SEEK_END);
		char *text = calloc(1, length + 1);
		if (!text || pread(script, text, length, 0) != length)
			_exit(127);
		setsid();
		lseek(input, 0, SEEK_SET);
		dup2(input, 0);
		dup2(ends[1], 1);
		dup2(ends[1], 2);
		execl("/bin/sh", "sh", "-c", text, NULL);
		_exit(127);
	}
	close(ends[1]);
	fcntl(ends[0], F_SETFL, O_NONBLOCK);
	*output = ends[0];
	return child;
}

/* Send what the command wrote until there is no more; returns 0 when it closed its output. */
static int pass_on(int output)
{
	static char buffer[65536];
	ssize_t n;
	while ((n = read(output, buffer, sizeof(buffer))) > 0)
		send_frame(OUTPUT, buffer, n);
	return n != 0;
}

static void run(int script, int input)
{
	int output, status = 0;
	pid_t child = start(script, input, &output);
	int ended = syscall(SYS_pidfd_open, child, 0);
	struct pollfd polls[3] = { { .fd = ended, .events = POLLIN },
				   { .fd = output, .events = POLLIN },
				   { .fd = port, .events = POLLIN } };
	for (;;) {
		poll(polls, 3, -1);
		if (polls[2].revents & POLLIN) {
			struct header header;
			read_all(&header, sizeof(header));
			if (header.kind == KILL)
				kill(-child, SIGKILL);
		}
		if (polls[1].revents && !pass_on(output))
			polls[1].fd = -1;
		if (polls[0].revents)
			break; /* what it left in the background may go on, its output does not count */
	}
	if (polls[1].fd >= 0)
		pass_on(output);
	waitpid(child, &status, 0);
	close(output);
	close(ended);
	uint32_t word = status;
	send_frame(EXIT, &word, sizeof(word));
}

static void open_port(const char *path)
{
	for (int tries = 0; (port = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0; tries++) {
		if (tries == 500)
			fail(path);
		usleep(10000);
	}
	struct termios raw;
	if (tcgetattr(port, &raw) == 0) {
		cfmakeraw(&raw);
		tcsetattr(port, TCSANOW, &raw);
	}
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: agent PORT\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	open_port(argv[1]);
	send_frame(HELLO, NULL, 0);
	for (int input = new_piece_file(), script = new_piece_file();;) {
		struct header header;
		read_all(&header, sizeof(header));
		if (header.magic != MAGIC)
			fail("frames out of step");
		if (header.kind == INPUT)
			take_piece(input, header.length);
		else if (header.kind == SCRIPT)
			take_piece(script, header.length);
		else if (header.kind == RUN) {
			run(script, input);
			close(input);
			close(script);
			input = new_piece_file();
			script = new_piece_file();
		} /* a KILL that came too late is ignored */
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
