//! Has the program export its `_exit`, so that a plugin's call of it is noticed; see `mblm_core::plugin::host::blame`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |name: &str| std::env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo:rustc-link-arg-bin=mblm=-Wl,--export-dynamic-symbol=_exit");
    }
}
