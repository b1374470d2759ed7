/* Exercises every operation of a file system by system calls in a guest, and prints one line for each check:
 * "ok NAME", "FAIL NAME: reason" or "skip NAME: reason". Ends with status 1 when any failed.
 *
 * Usage: operations DIRECTORY [CHECK]. DIRECTORY is on the mount to be tested, empty, and we are root.
 * Each check runs in a directory of its own and in a process of its own.
 */
#include "check.h"

static const struct check *const topics[] = {
	names_checks, directories_checks, data_checks, attributes_checks, concurrency_checks, NULL,
};

/* Run a check in a process and a directory of its own; whether it failed. */
static int run(const struct check *check)
{
	check_name = check->name;
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		need(mkdir(check_name, 0755) == 0 && chdir(check_name) == 0);
		check->run();
		printf("ok %s\n", check_name);
		fflush(stdout);
		_exit(0);
	}
	int status;
	waitpid(child, &status, 0);
	if (WIFSIGNALED(status))
		printf("FAIL %s: signal %d\n", check_name, WTERMSIG(status));
	return status != 0 && !(WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED);
}

int main(int argc, char **argv)
{
	int failed = 0;
	if (argc < 2 || chdir(argv[1])) {
		fprintf(stderr, "usage: operations DIRECTORY [CHECK]\n");
		return 2;
	}
	umask(022);
	for (const struct check *const *topic = topics; *topic; topic++)
		for (const struct check *check = *topic; check->name; check++)
			if (argc == 2 || strcmp(argv[2], check->name) == 0)
				failed |= run(check);
	return failed;
}
