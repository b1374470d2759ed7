/* What the parts of the actor share: the wire format (tests/torture/actions.py has the host's side) and two tables. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HELD_FILES = 8, LONGEST_FILE = 16384 };

/* Numbers below OBSERVATIONS change something, those from there on look. */
enum kind {
	CREATE, WRITE, WRITE_HELD, TRUNCATE, TRUNCATE_HELD, CHMOD, CHOWN, TOUCH, SET_XATTR,
	RENAME, LINK, SYMLINK, UNLINK, MKDIR, RMDIR, HOLD,
	OBSERVATIONS = 32, LSTAT = OBSERVATIONS, OPEN, MAP, READ_HELD, LIST, READ_LINK, GET_XATTR, ASK,
	WATCH = 128, /* added to an observation: repeat it until one field differs from a value */
};

/* The fields of a result that can be watched. */
enum field { ERROR, INODE, MODE, LINKS, SIZE, MTIME, CONTENT };

/* One action, followed by two strings, each with its NUL. */
struct action {
	uint8_t kind, slot; /* slot: of a held file; with WATCH the field, and the held file's slot is in offset */
	uint16_t flags;	    /* mode, open flags, rename flags; or milliseconds to watch */
	uint32_t offset, length;
	int64_t value; /* what is written; mtime in nanoseconds; uid << 16 | gid; the watched field's old value */
} __attribute__((packed));

struct result {
	int32_t error; /* 0 or an errno */
	uint32_t mode, links, uid, gid, content;
	uint64_t inode, size;
	int64_t mtime, ctime;
	uint32_t microseconds; /* that it took */
} __attribute__((packed));

struct request {
	uint16_t size, context;
} __attribute__((packed));

struct reply {
	uint16_t size, context;
	uint32_t consumed; /* bytes of requests that were read from the port so far */
} __attribute__((packed));

/* One of the threads: executes the actions of its requests in order. */
struct context {
	int held[HELD_FILES]; /* descriptors, or -1 */
};

/* Do an action that changes something; result->error tells of failure. */
void change(struct context *context, const struct action *action, const char *path, const char *other,
	    struct result *result);

/* Do an observation. */
void observe(struct context *context, const struct action *action, const char *path, struct result *result);

/* Write an attribute's or file's contents for a value: its 8 hexadecimal digits, again and again. */
void fill(char *buffer, uint32_t length, int64_t value);
