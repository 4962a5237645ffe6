/* Leaves a file behind when it is opened: MBLM_TEST_MARKER names it. Not a plugin: what matters is whether it is opened. */
#include <stdio.h>
#include <stdlib.h>

__attribute__((constructor)) static void opened(void) {
    const char *path = getenv("MBLM_TEST_MARKER");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) fclose(file);
}
