/* A PKCS#11 module that misbehaves as MODE says, or stands before SoftHSM and looks at what is asked. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ck;
/* CK_FUNCTION_LIST of version 2.40: a version, and 68 functions. */
struct list { unsigned char version[2]; void *functions[68]; };
enum { INITIALIZE = 0, SLOT_LIST = 4, SLOT_INFO = 5, TOKEN_INFO = 6, LOGIN = 18, DECRYPT_INIT = 33, DERIVE_KEY = 62 };
enum { CKR_GENERAL_ERROR = 5 };

static struct list own;
static ck (*slot_info)(ck, void *), (*token_info)(ck, void *), (*login)(ck, ck, void *, ck);

static int is(const char *mode) { return getenv("MODE") && strcmp(getenv("MODE"), mode) == 0; }

/* A line for the test. */
static void note(const char *text) {
	FILE *log = fopen(getenv("LOG"), "a");
	fprintf(log, "%s\n", text);
	fclose(log);
}

static void note_file(const char *path) {
	char text[4096];
	int file = open(path, O_RDONLY);
	ssize_t len = read(file, text, sizeof text - 1);
	for (ssize_t at = 0; at < len; at++)
		if (!text[at]) text[at] = ' ';
	text[len < 0 ? 0 : len] = 0;
	close(file);
	note(text);
}

static void hang(void) {
	char text[64];
	for (int number = 1; number < 32; number++) signal(number, SIG_IGN);
	if (fork()) snprintf(text, sizeof text, "hangs %d", getpid());
	else snprintf(text, sizeof text, "child %d", getpid());
	note(text);
	for (;;) pause();
}

static ck initialize(void *arguments) {
	(void)arguments;
	if (is("hang")) hang();
	if (is("crash")) *(volatile int *)8 = 1;
	if (is("exit")) exit(0);
	for (int fd = 0; fd < (is("print") ? 3 : is("forge") ? 16 : 0); fd++)
		dprintf(fd, "login\ndone\n0123456789abcdef0123456789abcdef");
	return is("print") || is("forge") ? CKR_GENERAL_ERROR : 0;
}

static ck many_slots(unsigned char present, ck *slots, ck *count) {
	(void)present, (void)slots;
	*count = (ck)1 << 60;
	return 0;
}

static ck fails(void) { return CKR_GENERAL_ERROR; }

static ck our_slot_info(ck slot, void *info) {
	ck result = slot_info(slot, info);
	/* CKF_HW_SLOT; the flags are behind 64 and 32 letters. */
	if (is("hardware")) *(ck *)((char *)info + 96) |= 4;
	return result;
}

static ck our_token_info(ck slot, void *info) {
	ck result = token_info(slot, info);
	/* CKF_USER_PIN_COUNT_LOW and the next two; the flags are behind 32, 32, 16 and 16 letters. */
	ck *flags = (ck *)((char *)info + 96);
	if (is("uncounted") || is("vague")) *flags &= ~(ck)0x70000;
	if (is("final")) *flags |= 0x20000;
	if (is("locked")) *flags |= 0x40000;
	return result;
}

static ck our_login(ck session, ck user, void *pin, ck len) {
	note("login");
	note_file("/proc/self/cmdline");
	note_file("/proc/self/environ");
	if (is("hang-login")) hang();
	ck result = login(session, user, pin, len);
	return result && is("vague") ? CKR_GENERAL_ERROR : result;
}

ck C_GetFunctionList(struct list **list) {
	ck (*functions)(struct list **);
	struct list *theirs;
	void *softhsm = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	if (!softhsm) return CKR_GENERAL_ERROR;
	*(void **)&functions = dlsym(softhsm, "C_GetFunctionList");
	if (functions(&theirs)) return CKR_GENERAL_ERROR;
	own = *theirs;
	*(void **)&slot_info = own.functions[SLOT_INFO];
	*(void **)&token_info = own.functions[TOKEN_INFO];
	*(void **)&login = own.functions[LOGIN];
	own.functions[SLOT_INFO] = (void *)our_slot_info;
	own.functions[TOKEN_INFO] = (void *)our_token_info;
	own.functions[LOGIN] = (void *)our_login;
	if (is("hang") || is("crash") || is("exit") || is("print") || is("forge")) own.functions[INITIALIZE] = (void *)initialize;
	if (is("rubbish")) own.functions[SLOT_LIST] = (void *)many_slots;
	if (is("hang-key")) own.functions[DECRYPT_INIT] = (void *)hang;
	if (is("broken-key")) own.functions[DECRYPT_INIT] = (void *)fails;
	*list = &own;
	return 0;
}
