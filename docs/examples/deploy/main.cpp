// Runs a saved trace that holds fused_attn's operators, without Python: deploy _native.so model.pt
#include <dlfcn.h>

#include <iostream>

#include <torch/script.h>

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: " << arguments[0] << " _native.so model.pt\n";
        return 2;
    }
    // The library defines its operators as it is loaded; nothing of it is called by name.
    if (!dlopen(arguments[1], RTLD_NOW)) {
        std::cerr << dlerror() << "\n";
        return 1;
    }
    torch::jit::Module model = torch::jit::load(arguments[2]);
    c10::InferenceMode inference;
    const at::Tensor x = at::arange(2 * 3 * 9 * 8, at::kFloat).view({2, 3, 9, 8}).div(432);
    std::cout << model.forward({x}).toTensor().sum().item<double>() << "\n";
}
