// csrc/cuda/device.h on a stand-in for the CUDA runtime and for torch: `PROGRAM SCENARIO [LIBRARY]` prints what came of
// it, a line "name value" each, and the error if there was one.
#include "../../csrc/cuda/device.h"

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

using namespace fused_attn::cuda;
using stand_in::machine;
using stand_in::Machine;

namespace {

// torch's guard: it goes back to the device before only where that one has a context, else it remembers it for torch's
// own calls.
thread_local int torchs_device = -1;
bool has_its_own_runtime = false;  // torch, of which the kernels' runtime then sees nothing
struct Guard {
    int before;
};
int current_of_torch() { return torchs_device >= 0 ? torchs_device : Machine::current; }

void kernel(int) {}
void another(int) {}

int cluster_of(int64_t bytes) {
    const OnDevice device(1);
    const KernelLimits limits = device.limits(kernel);
    return cluster_for(limits, limits.processors, 1 << 20, bytes, [&](int ranks) { return bytes / ranks; });
}
void launch_once(void (*which)(int), int index) {
    const OnDevice device(index);
    const KernelLimits limits = device.limits(which);
    launch(which, 0, dim3(static_cast<unsigned>(limits.cluster)), kThreads, limits.cluster, limits.shared, nullptr);
}

void run(const char* scenario, const char* library) {
    const auto is = [&](const char* name) { return std::strcmp(scenario, name) == 0; };
    Machine& m = machine();
    if (is("stream")) {
        // As Python loads libtorch_cuda: for nobody else.
        if (library && !dlopen(library, RTLD_NOW | RTLD_LOCAL)) std::printf("loading %s\n", dlerror());
        Machine::current = 1;
        const OnDevice device(1);
        std::printf("stream %td\n", reinterpret_cast<char*>(device.stream()) - static_cast<char*>(nullptr));
    } else if (is("threads")) {
        std::vector<std::thread> threads;
        for (int i = 0; i < 8; ++i)
            threads.emplace_back([i] {
                for (int n = 0; n < 50; ++n) launch_once(n % 2 ? kernel : another, (i + n / 2) % 2);
            });
        for (std::thread& thread : threads) thread.join();
    } else if (is("restore")) {
        m.contexts = {1};  // where the tensor is; this thread has touched no device
        launch_once(kernel, 1);
        std::printf("of torch %d\n", current_of_torch());
    } else if (is("restore a context")) {
        m.contexts = {0, 1};
        launch_once(kernel, 1);
        std::printf("current %d\n", Machine::current);
    } else if (is("apart")) {
        has_its_own_runtime = true;
        launch_once(kernel, 1);
    } else {  // limits and a launch, on what the words say
        char word[64];
        int value, used;
        for (const char* at = scenario; std::sscanf(at, "%63s %d%n", word, &value, &used) == 2; at += used) {
            const auto says = [&](const char* name) { return std::strcmp(word, name) == 0; };
            if (says("driver")) m.driver = value;
            if (says("runtime")) m.runtime = value;
            if (says("largest")) m.largest = value;
            if (says("room")) m.room = value;
            if (says("ptx")) m.ptx = value;
            if (says("registers")) m.registers = value;
            if (says("non_portable")) m.non_portable = value != 0;
            if (says("clusters")) m.devices[1].clusters = value != 0;
            if (says("shared")) m.devices[1].shared = value;
            if (says("capability")) m.devices[1].capability = value;
        }
        for (const int kib : {200, 1700, 3500, 4000}) std::printf("cluster %d %d\n", kib, cluster_of(kib * 1024));
        launch_once(kernel, 1);
        std::printf("launched %u\n", *m.clusters_launched.begin());
        std::printf("last error %d\n", cudaGetLastError());
    }
}

}  // namespace

extern "C" {
uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }  // torch's headers ask for it from 2.15 on
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* made) {
    Guard* const guard = new Guard{current_of_torch()};
    if (index != guard->before && !has_its_own_runtime) cudaSetDevice(index);
    torchs_device = -1;
    *made = reinterpret_cast<DeviceGuardHandle>(guard);
    return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle handle) {
    Guard* const guard = reinterpret_cast<Guard*>(handle);
    if (guard->before != Machine::current) {
        if (machine().contexts.count(guard->before)) {
            cudaSetDevice(guard->before);
        } else {
            torchs_device = guard->before;
        }
    }
    delete guard;
    return 0;
}
}

int main(int count, char** arguments) {
    try {
        run(arguments[1], count > 2 ? arguments[2] : nullptr);
    } catch (const std::exception& error) {
        std::printf("error %s\n", error.what());
    }
    for (const auto& [call, n] : machine().calls) std::printf("calls %s %d\n", call.c_str(), n);
    for (const int device : machine().contexts) std::printf("context %d\n", device);
    for (const int device : machine().launched_on) std::printf("launched-on %d\n", device);
}
