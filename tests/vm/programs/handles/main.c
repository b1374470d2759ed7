/*
 * File handles, as an NFS server uses them.
 *
 * handles take PATH HANDLE: write the file handle of PATH into the file HANDLE.
 * handles open MOUNT HANDLE: open what it is the handle of, and print the content of a file, or the names in a
 *                            directory; or the errno.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

union handle {
    struct file_handle head;
    char bytes[sizeof(struct file_handle) + MAX_HANDLE_SZ];
};

static int failed(void)
{
    puts(errno == ESTALE ? "ESTALE" : strerror(errno));
    return 1;
}

static int take(const char *path, const char *name)
{
    union handle handle = {.head.handle_bytes = MAX_HANDLE_SZ};
    int mount, fd;

    if (name_to_handle_at(AT_FDCWD, path, &handle.head, &mount, 0) < 0)
        return failed();
    fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, &handle, sizeof handle) != sizeof handle)
        return failed();
    return 0;
}

static int show(const char *mount, const char *name)
{
    union handle handle;
    char buffer[4096];
    struct dirent *entry;
    struct stat status;
    ssize_t size;
    DIR *directory;
    int fd = open(name, O_RDONLY), mount_fd;

    if (fd < 0 || read(fd, &handle, sizeof handle) != sizeof handle)
        return failed();
    mount_fd = open(mount, O_RDONLY);
    fd = open_by_handle_at(mount_fd, &handle.head, O_RDONLY);
    /* The mount is not to be held by this. */
    close(mount_fd);
    if (fd < 0 || fstat(fd, &status) < 0)
        return failed();
    if (!S_ISDIR(status.st_mode)) {
        size = read(fd, buffer, sizeof buffer);
        return size < 0 || write(1, buffer, size) != size ? failed() : 0;
    }
    directory = fdopendir(fd);
    while (directory && (entry = readdir(directory)))
        if (entry->d_name[0] != '.')
            puts(entry->d_name);
    return 0;
}

int main(int count, char **words)
{
    if (count != 4)
        return 2;
    return strcmp(words[1], "take") == 0 ? take(words[2], words[3]) : show(words[2], words[3]);
}
