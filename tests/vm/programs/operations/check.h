/* What all checks of this program use; to be included first. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SKIPPED = 77, BLOCK = 4096 };

struct check {
	const char *name;
	void (*run)(void);
};

#define CHECK(function) { #function, function }

/* Each topic's checks, up to one without a name. */
extern const struct check names_checks[], directories_checks[], data_checks[], attributes_checks[], concurrency_checks[];

extern const char *check_name; /* the one that runs */

/* Print a line about the running check, with errno. */
__attribute__((format(printf, 2, 3))) void say(const char *verdict, const char *format, ...);

/* Open a file, made when it is not there. */
int make(const char *name, int flags, mode_t mode);

/* Make or replace a file. */
void make_file(const char *name, const char *content);

/* Whether a file holds this and nothing more. */
int has(const char *name, const char *content);

/* lstat(2), which must succeed. */
struct stat status_of(const char *name);

/* Have only this user and group from now on. */
void become(uid_t uid, gid_t gid);

/* The condition must hold, or the check has failed. */
#define need(condition)                                                                   \
	do {                                                                              \
		if (!(condition)) {                                                       \
			say("FAIL", "%s:%d: %s", __FILE_NAME__, __LINE__, #condition);    \
			_exit(1);                                                         \
		}                                                                         \
	} while (0)

/* The call must fail with this error. */
#define refused(call, error)                                                              \
	do {                                                                              \
		errno = 0;                                                                \
		if ((call) != -1 || errno != (error)) {                                   \
			say("FAIL", "%s:%d: %s is not refused with %s", __FILE_NAME__, __LINE__, #call, #error); \
			_exit(1);                                                         \
		}                                                                         \
	} while (0)

/* Run part of a check as another user. */
#define as_user(uid, gid, ...)                                                            \
	do {                                                                              \
		pid_t child = fork();                                                     \
		if (child == 0) {                                                         \
			become(uid, gid);                                                 \
			__VA_ARGS__;                                                      \
			_exit(0);                                                         \
		}                                                                         \
		int status_;                                                              \
		need(waitpid(child, &status_, 0) == child);                               \
		if (status_)                                                              \
			_exit(1);                                                         \
	} while (0)
