/* Runs a kernel's step on a machine without Python: for each line "TEAM FILE" on stdin, all members of a team run
   `xllm_fn_kernel` of the library argv[1] on the arguments that FILE holds, in place; a line with the status follows.

   FILE: i64 count, then for each argument i64 pointer (0 or 1) and i64 value, of a pointer the offset from the file's
   begin; then the arrays. */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static _Alignas(64) char ctx[192];
static int32_t (*join_team)(void *, int32_t);

static void *member(void *number) {
  join_team(ctx, (int32_t)(intptr_t)number);
  return 0;
}

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) {
    fprintf(stderr, "%s\n", dlerror());
    exit(2);
  }
  return found;
}

int main(int argc, char **argv) {
  void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : 0;
  if (!library) {
    fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "one argument: a library");
    return 2;
  }
  void *step = symbol(library, "xllm_fn_kernel");
  int32_t (*run)(void *, void *, const int64_t *) = symbol(library, "xllm_team_run");
  int32_t (*stop)(void *) = symbol(library, "xllm_team_stop");
  join_team = symbol(library, "xllm_team_join");

  int team;
  char path[4096];
  while (scanf("%d %4095s", &team, path) == 2) {
    int file = open(path, O_RDWR);
    struct stat facts;
    if (file < 0 || fstat(file, &facts)) {
      perror(path);
      return 2;
    }
    int64_t *head = mmap(0, facts.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (head == MAP_FAILED) {
      perror(path);
      return 2;
    }
    int64_t args[64];
    for (int64_t i = 0; i < head[0]; i++)
      args[i] = head[1 + 2 * i] ? (int64_t)(intptr_t)head + head[2 + 2 * i] : head[2 + 2 * i];

    pthread_t threads[64];
    for (size_t i = 0; i < sizeof ctx; i++) ctx[i] = 0;
    *(int32_t *)(ctx + 140) = team;
    for (intptr_t i = 1; i < team; i++) pthread_create(&threads[i], 0, member, (void *)i);
    int status = run(ctx, step, args);
    stop(ctx);
    for (int i = 1; i < team; i++) pthread_join(threads[i], 0);
    munmap(head, facts.st_size);
    close(file);
    printf("%d\n", status);
    fflush(stdout);
  }
  return 0;
}
