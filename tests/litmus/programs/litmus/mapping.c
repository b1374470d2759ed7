#define _GNU_SOURCE
#include "mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DIGITS = 4 };

static _Thread_local sigjmp_buf beyond_end;

static void on_sigbus(int number)
{
	siglongjmp(beyond_end, number);
}

void mapping_prepare(void)
{
	sigaction(SIGBUS, &(struct sigaction){ .sa_handler = on_sigbus }, NULL);
}

int32_t mapping_make(const char *file, word **words)
{
	int fd = open(file, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	void *memory = mmap(NULL, MAPPING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int32_t outcome = memory == MAP_FAILED ? -errno : 0;
	close(fd);
	*words = outcome ? NULL : memory;
	return outcome;
}

void mapping_remove(word *words)
{
	munmap((void *)words, MAPPING_BYTES);
}

int32_t mapping_load(word *words, int position)
{
	if (sigsetjmp(beyond_end, 1))
		return -EFAULT;
	uint32_t content = atomic_load(&words[position]);
	char digits[DIGITS];
	memcpy(digits, &content, DIGITS);
	int32_t number = 0;
	for (int i = 0; i < DIGITS; i++) {
		if (digits[i] < '0' || digits[i] > '9')
			return -EILSEQ;
		number = number * 10 + digits[i] - '0';
	}
	return number;
}

int32_t mapping_store(word *words, int position, int number)
{
	char digits[DIGITS + 8];
	uint32_t content;
	snprintf(digits, sizeof(digits), "%04d", number % 10000);
	memcpy(&content, digits, DIGITS);
	if (sigsetjmp(beyond_end, 1))
		return -EFAULT;
	atomic_store(&words[position], content);
	return 0;
}
