/* Directories, listings, and names that are odd, long or deep. */
#include "check.h"

#include <dirent.h>
#include <limits.h>

static void directories(void)
{
	need(mkdir("d", 0755) == 0);
	refused(mkdir("d", 0755), EEXIST);
	refused(mkdir("none/d", 0755), ENOENT);
	nlink_t before = status_of("d").st_nlink;
	need(mkdir("d/e", 0755) == 0 && status_of("d").st_nlink >= before);
	refused(rmdir("d"), ENOTEMPTY);
	refused(unlink("d"), EISDIR);
	make_file("f", "x");
	refused(rmdir("f"), ENOTDIR);
	need(rmdir("d/e") == 0 && rmdir("d") == 0);
	refused(rmdir("d"), ENOENT);
	need(mkdir("gone", 0755) == 0);
	int fd = open("gone", O_RDONLY | O_DIRECTORY);
	need(fd >= 0 && rmdir("gone") == 0);
	refused(openat(fd, "x", O_CREAT | O_WRONLY, 0600), ENOENT);
}

static void listing(void)
{
	enum { COUNT = 700 };
	char name[300], seen[COUNT] = { 0 };
	int dots = 0, found = 0;
	long place = -1;
	struct dirent *entry;
	need(mkdir("d", 0755) == 0);
	for (int i = 0; i < COUNT; i++) {
		snprintf(name, sizeof(name), "d/%04d-%0*d", i, i % 200 + 1, 0);
		make_file(name, "x");
	}
	DIR *d = opendir("d");
	need(d);
	for (int n = 0; (entry = readdir(d)); n++) {
		if (entry->d_name[0] == '.') {
			need(entry->d_type == DT_DIR);
			dots++;
			continue;
		}
		int i = atoi(entry->d_name);
		need(entry->d_type == DT_REG && i >= 0 && i < COUNT && !seen[i]);
		seen[i] = 1;
		found++;
		if (n == 400)
			place = telldir(d);
	}
	need(dots == 2 && found == COUNT);
	int after = 0;
	seekdir(d, place);
	while (readdir(d))
		after++;
	need(after == COUNT + 2 - 401);
	rewinddir(d);
	int all = 0;
	while (readdir(d))
		all++;
	need(all == COUNT + 2);
	rewinddir(d);
	for (int i = 0; i < COUNT; i++) { /* deleting while listing must terminate and leave nothing */
		snprintf(name, sizeof(name), "d/%04d-%0*d", i, i % 200 + 1, 0);
		need(unlink(name) == 0);
	}
	closedir(d);
	need(rmdir("d") == 0);
}

static void names(void)
{
	char name[300];
	memset(name, 'n', sizeof(name));
	name[255] = 0;
	make_file(name, "long");
	need(has(name, "long") && unlink(name) == 0);
	name[255] = 'n';
	name[256] = 0;
	refused(open(name, O_CREAT | O_WRONLY, 0600), ENAMETOOLONG);
	refused(mkdir(name, 0700), ENAMETOOLONG);
	const char *odd[] = { "\xff\xfe\x80 not UTF-8", "new\nline", " ", "-rf", "...", "back\\slash", "\xe2\x82\xac" };
	for (size_t i = 0; i < sizeof(odd) / sizeof(*odd); i++) {
		int found = 0;
		struct dirent *entry;
		make_file(odd[i], "odd");
		DIR *d = opendir(".");
		while ((entry = readdir(d)))
			found += strcmp(entry->d_name, odd[i]) == 0;
		closedir(d);
		need(found == 1 && has(odd[i], "odd") && unlink(odd[i]) == 0);
	}
}

static void deep_tree(void)
{
	for (int i = 0; i < 60; i++)
		need(mkdir("deeper", 0755) == 0 && chdir("deeper") == 0);
	make_file("bottom", "x");
	need(has("../deeper/bottom", "x"));
	char path[PATH_MAX];
	need(getcwd(path, sizeof(path)) && strstr(path, "deeper/deeper/deeper"));
	need(unlink("bottom") == 0);
}

const struct check directories_checks[] = {
	CHECK(directories),
	CHECK(listing),
	CHECK(names),
	CHECK(deep_tree),
	{ NULL, NULL },
};
