fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Objects of the library behind it point to its tables.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libsmddp_standin_fabric.so");
}
