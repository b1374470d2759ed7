/* Reads or writes physical memory: window ADDRESS LENGTH, or window ADDRESS - TEXT. For a guest booted with
 * iomem=relaxed, as the window's memory belongs to a driver. Not with read(2) and write(2), which end where RAM does. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	off_t address = strtoull(argv[1], NULL, 0);
	size_t slack = address & 4095;
	size_t length = argc > 3 ? strlen(argv[3]) : strtoul(argv[2], NULL, 0);
	int fd = open("/dev/mem", O_RDWR);
	char *memory = mmap(NULL, slack + length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, address - slack);

	if (memory == MAP_FAILED) {
		perror("/dev/mem");
		return 1;
	}
	if (argc > 3)
		memcpy(memory + slack, argv[3], length);
	else
		fwrite(memory + slack, 1, length, stdout);
	return 0;
}
