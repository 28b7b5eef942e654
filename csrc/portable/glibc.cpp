// What a library that is linked on a newer Linux would ask of it, in terms of the C and C++ libraries that
// manylinux_2_28 has. setup.py has the linker send the references here (--wrap, by the names below) where
// FUSED_ATTN_PORTABLE=1; auditwheel says whether anything is left.

#include <ios>
#include <new>
#include <sstream>

extern "C" {

// glibc 2.29 has an exp that sets no errno for SVID; the older one has the same values.
double older_exp(double);
#if defined(__x86_64__)
__asm__(".symver older_exp, exp@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver older_exp, exp@GLIBC_2.17");
#endif
double __wrap_exp(double x) { return older_exp(x); }

// glibc 2.32 says whether there is one thread, so that reference counts need not be atomic; here they always are.
__attribute__((visibility("hidden"))) char __wrap___libc_single_threaded = 0;

// libstdc++ 9 has constructors without the argument.
void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
    new (self) std::ostringstream(std::ios_base::out);
}
void __wrap__ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
    new (self) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// libstdc++ 11 has a function for it.
[[noreturn]] void __wrap__ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }

}  // extern "C"
