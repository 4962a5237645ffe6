//! The plugin header and its Rust form agree: C is compiled against the header and prints sizes, offsets and constants. A
//! plugin that was compiled against the header of version 1.0 still loads.

mod compiled;

use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use mblm::abi;
use mblm::plugin::host::{Library, PluginSource};
use mblm::registry::BlockRegistry;
use mblm::yaml::Document;
use mblm::{Init, Param, ParamStore};

macro_rules! layout {
    ($c:literal, $rust:ty, [$($field:ident),* $(,)?]) => {
        ($c, size_of::<$rust>(), align_of::<$rust>(), vec![$((stringify!($field), offset_of!($rust, $field))),*])
    };
}

#[test]
fn sizes_offsets_and_constants_are_the_headers() {
    let structs = [
        layout!("mblm_text", abi::Text, [data, len]),
        layout!("mblm_host", abi::Host, [struct_size, major, minor, num_threads, context, set_error, log]),
        layout!(
            "mblm_param_info",
            abi::ParamInfo,
            [struct_size, init, a, b, gain, num_dims, dims, name, decay, reserved]
        ),
        layout!("mblm_params", abi::Params, [struct_size, count, version, values]),
        layout!("mblm_pass", abi::Pass, [struct_size, training, batch, seq, dim, seed, mask]),
        layout!("mblm_instance_info", abi::InstanceInfo, [struct_size, is_causal, num_params]),
        layout!(
            "mblm_block",
            abi::Block,
            [
                struct_size,
                flags,
                block_type,
                version,
                about,
                schema,
                user,
                check,
                create,
                destroy,
                param,
                forward,
                backward,
                tape_free,
                state_create,
                state_reset,
                state_clone,
                state_save,
                state_load,
                state_free,
                step,
                prefill,
                cost
            ]
        ),
        layout!(
            "mblm_plugin",
            abi::Plugin,
            [magic, struct_size, major, minor, name, version, num_blocks, blocks, init]
        ),
    ];
    let constants: [(&str, i64); 33] = [
        ("MBLM_PLUGIN_MAGIC", abi::MAGIC as i64),
        ("MBLM_PLUGIN_MAJOR", abi::MAJOR as i64),
        ("MBLM_PLUGIN_MINOR", abi::MINOR as i64),
        ("MBLM_MAX_DIMS", abi::MAX_DIMS as i64),
        ("MBLM_OK", abi::OK as i64),
        ("MBLM_INVALID", abi::INVALID as i64),
        ("MBLM_UNSUPPORTED", abi::UNSUPPORTED as i64),
        ("MBLM_FAILED", abi::FAILED as i64),
        ("MBLM_PANICKED", abi::PANICKED as i64),
        ("MBLM_LOG_ERROR", abi::LOG_ERROR as i64),
        ("MBLM_LOG_WARN", abi::LOG_WARN as i64),
        ("MBLM_LOG_INFO", abi::LOG_INFO as i64),
        ("MBLM_LOG_DEBUG", abi::LOG_DEBUG as i64),
        ("MBLM_POS_NONE", abi::POS_NONE as i64),
        ("MBLM_POS_FIXED", abi::POS_FIXED as i64),
        ("MBLM_POS_ROPE", abi::POS_ROPE as i64),
        ("MBLM_INIT_CONST", abi::INIT_CONST as i64),
        ("MBLM_INIT_NORMAL", abi::INIT_NORMAL as i64),
        ("MBLM_INIT_UNIFORM", abi::INIT_UNIFORM as i64),
        ("MBLM_INIT_LOG_UNIFORM", abi::INIT_LOG_UNIFORM as i64),
        ("MBLM_INIT_LOG_RANGE", abi::INIT_LOG_RANGE as i64),
        ("MBLM_INIT_INVERSE_SOFTPLUS_DT", abi::INIT_INVERSE_SOFTPLUS_DT as i64),
        ("MBLM_INIT_NORMAL_WITH", abi::INIT_NORMAL_WITH as i64),
        ("MBLM_INIT_UNIFORM_BETWEEN", abi::INIT_UNIFORM_BETWEEN as i64),
        ("MBLM_DECAY_BY_NAME", abi::DECAY_BY_NAME as i64),
        ("MBLM_DECAY_YES", abi::DECAY_YES as i64),
        ("MBLM_DECAY_NO", abi::DECAY_NO as i64),
        ("MBLM_BACKWARD", abi::BACKWARD as i64),
        ("MBLM_STEP", abi::STEP as i64),
        ("MBLM_MASK", abi::MASK as i64),
        ("MBLM_CONCURRENT", abi::CONCURRENT as i64),
        ("MBLM_DETERMINISTIC", abi::DETERMINISTIC as i64),
        ("sizeof(mblm_status)", size_of::<abi::Status>() as i64),
    ];

    let mut program = String::from("#include <mblm_plugin.h>\n#include <stddef.h>\n#include <stdio.h>\n");
    program.push_str("#define SHOW(x) printf(#x \" %lld\\n\", (long long)(x));\nint main(void) {\n");
    let mut want = String::new();
    for (name, size, align, fields) in &structs {
        writeln!(program, "SHOW(sizeof({name})) SHOW(_Alignof({name}))").unwrap();
        write!(want, "sizeof({name}) {size}\n_Alignof({name}) {align}\n").unwrap();
        for (field, offset) in fields {
            writeln!(program, "SHOW(offsetof({name}, {field}))").unwrap();
            writeln!(want, "offsetof({name}, {field}) {offset}").unwrap();
        }
    }
    for (name, value) in &constants {
        // The text of the expression, not of what a macro stands for.
        writeln!(program, "printf(\"{name} %lld\\n\", (long long)({name}));").unwrap();
        writeln!(want, "{name} {value}").unwrap();
    }
    program.push_str("}\n");

    let folder = tempfile::tempdir().unwrap();
    let (source, binary) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&source, program).unwrap();
    let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/mblm-sdk/include");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-pedantic", "-Wall", "-Werror", include, "-o"]).arg(&binary).arg(&source);
    let built = cc.output().expect("a C compiler called cc");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let printed = Command::new(&binary).output().unwrap();
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), want);
}

/// Name, how it starts and whether it decays, of each parameter of the library's block.
fn params(library: &Path, block_type: &str) -> Vec<(String, Init, bool)> {
    let library = Library::open(library).unwrap();
    let registry = BlockRegistry::empty().with_source(PluginSource(library)).unwrap();
    let document = Document::parse(&format!("block: {{block_type: {block_type}}}"), "test").unwrap();
    let block = registry.parse(&document, "block").unwrap();
    let mut store = ParamStore::new(0);
    block.build(8, 1, &mut store.root()).unwrap();
    let about = |param: &Arc<Param>| (param.name().to_string(), param.start().init, param.weight_decay());
    store.iter().map(about).collect()
}

#[test]
fn a_plugin_of_version_1_0_loads_and_its_parameters_decay_by_name() {
    // What the header was before 1.1 appended to it.
    let header = abi::HEADER.replace("#define MBLM_PLUGIN_MINOR 1u", "#define MBLM_PLUGIN_MINOR 0u");
    let (before, rest) = header.split_once("    /* Since 1.1: write it only if").unwrap();
    let old = format!("{before}{}", rest.split_once("uint32_t reserved;\n").unwrap().1);
    let old = old
        .replace("} mblm_param_info;", "} mblm_param_info;\n_Static_assert(sizeof(mblm_param_info) == 72, \"1.0\");");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("mblm_plugin.h"), old).unwrap();
    let place = folder.path().to_str().unwrap();
    let [old, new] = [("old", &["-iquote", place][..]), ("new", &[])]
        .map(|(name, args)| params(&compiled::compile("plugins/mingru/mingru.c", folder.path(), name, args), "mingru"));
    assert_eq!(old, new);
    assert!(old.iter().any(|(_, _, decays)| *decays) && old.iter().any(|(_, _, decays)| !*decays), "{old:?}");
}

#[test]
fn a_plugin_of_version_1_1_says_what_decays_and_starts_between_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let start = Init::UniformBetween { low: 2.0, high: 3.0 };
    let want = [("mix".into(), start, false), ("scale".into(), start, true)];
    assert_eq!(params(&compiled::broken(folder.path(), "DECAY"), "leaky"), want);
}
