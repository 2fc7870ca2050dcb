/* A libnvidia-ml.so.1 with fake GPUs that follow a script, for tests on machines without GPUs.
 *
 * FAKE_NVML names the script, whose lines are:
 *
 *   origin NS                    time at which readings have their VALUE, ns of CLOCK_MONOTONIC; first
 *   init CODE                    what nvmlInit returns
 *   count CODE                   what nvmlDeviceGetCount returns
 *   gpu UUID                     a GPU; the lines below belong to it
 *   mig UUID                     a MIG device: found by its name, and not counted
 *   set KEY VALUE PER_SECOND     a reading: VALUE, plus PER_SECOND for each second
 *   fail KEY CODE MOMENT         the call returns CODE; `all` stands for every key
 *   hang KEY MOMENT              the call does not return
 *
 * MOMENT is `always`, or `later`: from when a file exists with the script's name plus `.later`.
 * Keys: open power instant energy used reserved utilization sm_clock memory_clock temperature
 * reasons. A key that is not set is not supported. With OLD_DRIVER, functions that drivers of
 * 2019 (R418) did not have are missing. Types and numbers are those of nvml.h.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum moment { NEVER, ALWAYS, LATER };
enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, MOST = 16 };
enum { INSTANT_POWER = 186, UNSIGNED_INT = 1, CLOCK_SM = 1, CLOCK_MEMORY = 2 };

static const char *const keys[] = {"open",     "power",        "instant",     "energy",
                                   "used",     "reserved",     "utilization", "sm_clock",
                                   "memory_clock", "temperature", "reasons"};
enum { KEYS = sizeof keys / sizeof *keys };

typedef struct {
    char uuid[96];
    int part;
    struct {
        int set, code;
        enum moment fails, hangs;
        double value, per_second;
    } readings[KEYS];
} gpu;

static gpu gpus[MOST];
static unsigned count;
static int count_code;
static double origin;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9 - origin;
}

static void refuse(const char *line) {
    fprintf(stderr, "fake_nvml: unknown line in the script: %s\n", line);
    abort();
}

static void add(const char *uuid, int part) {
    if (count == MOST)
        refuse(uuid);
    gpu *added = &gpus[count++];
    memset(added, 0, sizeof *added);
    snprintf(added->uuid, sizeof added->uuid, "%s", uuid);
    added->part = part;
    added->readings[0].set = 1;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *path = getenv("FAKE_NVML");
    FILE *script = path ? fopen(path, "r") : NULL;
    if (!script)
        refuse("FAKE_NVML names no file");
    char line[256], name[96], moment[8];
    int code = SUCCESS;
    count = 0;
    while (fgets(line, sizeof line, script)) {
        double value, more = 0;
        if (sscanf(line, "origin %lf", &value) == 1) {
            origin = value / 1e9;
        } else if (sscanf(line, "init %d", &code) == 1) {
        } else if (sscanf(line, "count %d", &count_code) == 1) {
        } else if (sscanf(line, "gpu %95s", name) == 1) {
            add(name, 0);
        } else if (sscanf(line, "mig %95s", name) == 1) {
            add(name, 1);
        } else {
            int error = 0;
            int set = sscanf(line, "set %95s %lf %lf", name, &value, &more) == 3;
            int fails = !set && sscanf(line, "fail %95s %d %7s", name, &error, moment) == 3;
            int hangs = !set && !fails && sscanf(line, "hang %95s %7s", name, moment) == 2;
            enum moment from = set ? NEVER : strcmp(moment, "later") ? ALWAYS : LATER;
            int found = 0;
            for (int key = 0; key < KEYS && count; key++) {
                if (strcmp(name, keys[key]) && (set || strcmp(name, "all")))
                    continue;
                gpu *last = &gpus[count - 1];
                found = 1;
                if (set) {
                    last->readings[key].set = 1;
                    last->readings[key].value = value;
                    last->readings[key].per_second = more;
                } else if (fails) {
                    last->readings[key].code = error;
                    last->readings[key].fails = from;
                } else if (hangs) {
                    last->readings[key].hangs = from;
                }
            }
            if (!found || !(set || fails || hangs))
                refuse(line);
        }
    }
    fclose(script);
    return code;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "scripted error %d", code);
    return text;
}

static int begun(enum moment from) {
    char path[4096];
    snprintf(path, sizeof path, "%s.later", getenv("FAKE_NVML"));
    return from == ALWAYS || (from == LATER && access(path, F_OK) == 0);
}

static int reading(gpu *of, const char *name, double *value) {
    int key = 0;
    while (strcmp(keys[key], name))
        key++;
    if (begun(of->readings[key].hangs))
        for (;;)
            pause();
    if (begun(of->readings[key].fails))
        return of->readings[key].code;
    if (!of->readings[key].set)
        return NOT_SUPPORTED;
    *value = of->readings[key].value + of->readings[key].per_second * now();
    return SUCCESS;
}

static int whole(gpu *of, const char *name, unsigned *out) {
    double value;
    int code = reading(of, name, &value);
    if (code == SUCCESS)
        *out = (unsigned)value;
    return code;
}

static int wide(gpu *of, const char *name, unsigned long long *out) {
    double value;
    int code = reading(of, name, &value);
    if (code == SUCCESS)
        *out = (unsigned long long)value;
    return code;
}

static int opened(gpu *found, gpu **out) {
    double ignored;
    int code = reading(found, "open", &ignored);
    if (code == SUCCESS)
        *out = found;
    return code;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    *out = 0;
    for (unsigned i = 0; i < count; i++)
        *out += !gpus[i].part;
    return count_code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, gpu **out) {
    for (unsigned i = 0; i < count; i++)
        if (!gpus[i].part && index-- == 0)
            return opened(&gpus[i], out);
    return INVALID;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, gpu **out) {
    for (unsigned i = 0; i < count; i++)
        if (!strcmp(gpus[i].uuid, uuid))
            return opened(&gpus[i], out);
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(gpu *of, char *out, unsigned length) {
    snprintf(out, length, "%s", of->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(gpu *of, char *out, unsigned length) {
    snprintf(out, length, of->part ? "Scripted part" : "Scripted GPU");
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    snprintf(out, length, "580.65.06");
    return SUCCESS;
}

typedef struct {
    unsigned long long total, free, used;
} memory;

int nvmlDeviceGetMemoryInfo(gpu *of, memory *out) {
    /* Before version 2, used memory includes the memory that the driver reserves. */
    unsigned long long reserved = 0;
    wide(of, "reserved", &reserved);
    int code = wide(of, "used", &out->used);
    out->used += reserved;
    return code;
}

int nvmlDeviceGetUtilizationRates(gpu *of, unsigned out[2]) {
    return whole(of, "utilization", &out[0]);
}

int nvmlDeviceGetPowerUsage(gpu *of, unsigned *out) { return whole(of, "power", out); }

int nvmlDeviceGetClockInfo(gpu *of, int clock, unsigned *out) {
    return clock == CLOCK_SM       ? whole(of, "sm_clock", out)
           : clock == CLOCK_MEMORY ? whole(of, "memory_clock", out)
                                   : INVALID;
}

int nvmlDeviceGetTemperature(gpu *of, int sensor, unsigned *out) {
    return sensor ? INVALID : whole(of, "temperature", out);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(gpu *of, unsigned long long *out) {
    return wide(of, "reasons", out);
}

int nvmlDeviceGetTotalEnergyConsumption(gpu *of, unsigned long long *out) {
    return wide(of, "energy", out);
}

#ifndef OLD_DRIVER
typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_v2;

int nvmlDeviceGetMemoryInfo_v2(gpu *of, memory_v2 *out) {
    if (out->version != (2u << 24 | sizeof *out))
        return INVALID;
    wide(of, "reserved", &out->reserved);
    return wide(of, "used", &out->used);
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, code;
    union {
        double real;
        unsigned whole;
        unsigned long long wide;
    } value;
} field;

int nvmlDeviceGetFieldValues(gpu *of, int fields, field *out) {
    for (int i = 0; i < fields; i++) {
        out[i].type = UNSIGNED_INT;
        out[i].code = out[i].field == INSTANT_POWER ? whole(of, "instant", &out[i].value.whole)
                                                    : NOT_SUPPORTED;
    }
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(gpu *of, unsigned long long *out) {
    return wide(of, "reasons", out);
}
#endif
