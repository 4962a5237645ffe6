//! Files that are whole, damaged, and hostile.

use std::io::{Cursor, Seek, SeekFrom, Write};
use std::path::PathBuf;

use mblm_base::random::mix;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;
use crate::pickle::NumpyType;
use crate::write::write;

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    std::fs::read(path).unwrap()
}

/// A file that torch wrote; `tests/pth/make.py` says how.
fn torch(name: &str) -> Vec<u8> {
    golden(&format!("../pth/{name}.pth"))
}

/// An archive with these entries in the folder `x`.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    archive_in("x", entries)
}

fn archive_in(folder: &str, entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file(format!("{folder}/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// The archive as torch ends it: with the records of zip64 between the directory and the end. If `needed`, the sizes
/// and the offset stand there alone.
fn with_zip64(mut archive: Vec<u8>, needed: bool) -> Vec<u8> {
    let end = archive.len() - 22;
    let field =
        |at: usize, len: usize| archive[end + at..end + at + len].iter().rev().fold(0, |n, b| n << 8 | *b as u64);
    let (count, size, offset) = (field(10, 2), field(12, 4), field(16, 4));
    let mut records = b"PK\x06\x06".to_vec();
    records.extend(44u64.to_le_bytes());
    records.extend([0x1e, 0x03, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    [count, count, size, offset].iter().for_each(|number| records.extend(number.to_le_bytes()));
    records.extend(b"PK\x06\x07\0\0\0\0");
    records.extend((end as u64).to_le_bytes());
    records.extend(1u32.to_le_bytes());
    if needed {
        archive[end + 8..end + 20].fill(0xff);
    }
    archive.splice(end..end, records);
    archive
}

fn fault_of(bytes: Vec<u8>) -> String {
    parse(Cursor::new(bytes)).unwrap_err()
}

/// The fault of an archive with this pickle and 24 bytes of storage `0`.
fn fault_of_pickle(pickle: &[u8]) -> String {
    fault_of(archive(&[("data.pkl", pickle), ("data/0", &[0; 24])]))
}

/// A pickle of a model with one tensor "w", whose arguments are the given instructions.
fn model(tensor: &[u8]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(X\x05\0\0\0MODEL}X\x01\0\0\0w".to_vec();
    pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n");
    pickle.extend(tensor);
    pickle.extend(b"RsX\x04\0\0\0LOSSK\x01u.");
    pickle
}

/// Storage `0` with this number of elements, on the stack.
fn storage(class: &str, elements: u8) -> Vec<u8> {
    let mut pickle = b"(X\x07\0\0\0storagectorch\n".to_vec();
    pickle.extend(class.as_bytes());
    pickle.extend(b"\nX\x01\0\0\x000X\x03\0\0\0cpuK");
    pickle.push(elements);
    pickle.extend(b"tQ");
    pickle
}

/// `(storage, 0, shape, strides)` of a float storage of 6 elements.
fn arguments(shape: &[u8], strides: &[u8]) -> Vec<u8> {
    [b"(".as_slice(), &storage("FloatStorage", 6), b"K\0(", shape, b"t(", strides, b"t\x89}t"].concat()
}

#[test]
fn both_layouts_of_names_give_the_same_tensors() {
    let new = parse(Cursor::new(golden("tt_2d.pth"))).unwrap();
    assert_eq!((new.weights.len(), new.others.len(), new.loss), (47, 0, 1.25));
    assert_eq!(new.weights["token_embs_rev.1.embedding.weight"].0, [259, 24]);
    assert_eq!(new, parse(Cursor::new(golden("tt_2d_v040.pth"))).unwrap());
}

#[test]
fn what_is_written_is_read_bit_for_bit() {
    let mut saved = parse(Cursor::new(golden("tt_2d.pth"))).unwrap();
    saved.loss = 0.1 + 0.2;
    saved.weights.insert("scalar".into(), (vec![], vec![-0.0]));
    saved.weights.insert("none".into(), (vec![3, 0, 2], vec![]));
    let mut file = Cursor::new(Vec::new());
    write(&mut file, &saved.weights, saved.loss).unwrap();
    assert_eq!(parse(file).unwrap(), saved);
}

#[test]
fn a_handmade_file_is_read() {
    let pickle = model(&arguments(b"K\x03K\x02", b"K\x01K\x03"));
    let little: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let big: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_be_bytes()).collect();
    for (order, numbers) in [("little", &little), ("big", &big)] {
        let entries = [("data.pkl", &pickle[..]), ("byteorder", order.as_bytes()), ("data/0", numbers)];
        let saved = parse(Cursor::new(archive(&entries))).unwrap();
        assert_eq!(saved.weights["w"], (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]), "{order}");
        assert_eq!(saved.loss, 1.0);
    }
    let entries = [("data.pkl", &pickle[..]), ("byteorder", b"middle"), ("data/0", &little)];
    assert!(fault_of(archive(&entries)).contains("expected little or big, found \"middle\""));
}

#[test]
fn a_file_of_any_name_is_read() {
    // Torch names the archive's folder after the file. With 21 characters the second entry of the directory stands
    // where the first one would without the records of zip64.
    let numbers: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let pickle = model(&arguments(b"K\x06", b"K\x01"));
    let entries = [("data.pkl", &pickle[..]), ("byteorder", b"little"), ("data/0", &numbers), ("version", b"3\n")];
    for len in 1..=300 {
        let archive = archive_in(&"n".repeat(len), &entries);
        for bytes in [archive.clone(), with_zip64(archive.clone(), false), with_zip64(archive, true)] {
            let saved = parse(Cursor::new(bytes)).unwrap_or_else(|fault| panic!("{len} characters: {fault}"));
            assert_eq!(saved.weights["w"].1, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        }
    }
}

#[test]
fn an_archive_behind_something_else_is_refused() {
    let archive =
        with_zip64(archive(&[("data.pkl", &model(&arguments(b"K\x06", b"K\x01"))), ("data/0", &[0; 24])]), false);
    for prefix in [&b"#!/bin/sh\n"[..], b"PK\x03\x04"] {
        let fault = fault_of([prefix, &archive].concat());
        assert!(fault.starts_with("expected a zip archive"), "{fault}");
    }
}

/// Little-endian numbers of so many bytes.
fn fields(numbers: &[(u64, usize)]) -> Vec<u8> {
    numbers.iter().flat_map(|&(number, len)| number.to_le_bytes().into_iter().take(len)).collect()
}

/// More than 4 GiB, of which the file system stores a few blocks: only what is needed is read.
#[test]
fn a_file_that_needs_zip64_is_read() {
    const HOLE: u64 = 5 << 30;
    const ALL: u64 = u64::MAX;
    let small = archive(&[("data.pkl", &model(&arguments(b"K\x06", b"K\x01"))), ("data/0", &[0; 24])]);
    let end = small.len() - 22;
    let directory = u32::from_le_bytes(small[end + 16..end + 20].try_into().unwrap()) as usize;
    // The hole is the first entry, so that the offsets of the others need 64 bits.
    let name = b"x/data/1";
    let sizes = [(name.len() as u64, 2), (20, 2)];
    let extra = [name.as_slice(), &fields(&[(1, 2), (16, 2), (HOLE, 8), (HOLE, 8)])].concat();
    let both = [&[(45, 2), (0, 8), (0, 4), (ALL, 4), (ALL, 4)], &sizes[..]].concat();
    let hole = [b"PK\x03\x04".as_slice(), &fields(&both), &extra].concat();
    let shift = hole.len() as u64 + HOLE;
    let mut entries = [b"PK\x01\x02\x2d\0".as_slice(), &fields(&both), &[0; 14], &extra].concat();
    let mut rest = &small[directory..end];
    while !rest.is_empty() {
        let (fixed, offset) = (&rest[..42], u32::from_le_bytes(rest[42..46].try_into().unwrap()));
        let name = &rest[46..46 + fixed[28] as usize];
        entries.extend([&fixed[..30], &[12, 0], &fixed[32..], &[0xff; 4], name].concat());
        entries.extend(fields(&[(1, 2), (8, 2), (offset as u64 + shift, 8)]));
        rest = &rest[46 + name.len()..];
    }
    let (start, size) = (shift + directory as u64, entries.len() as u64);
    let ending = [
        b"PK\x06\x06".as_slice(),
        &fields(&[(44, 8), (45, 2), (45, 2), (0, 8), (3, 8), (3, 8), (size, 8), (start, 8)]),
        b"PK\x06\x07",
        &fields(&[(0, 4), (start + size, 8), (1, 4)]),
        b"PK\x05\x06",
        &fields(&[(0, 4), (ALL, 2), (ALL, 2), (ALL, 4), (ALL, 4), (0, 2)]),
    ];
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&hole).unwrap();
    file.seek(SeekFrom::Start(shift)).unwrap();
    file.write_all(&[&small[..directory], &entries, &ending.concat()].concat()).unwrap();
    file.rewind().unwrap();
    assert_eq!(parse(file).unwrap().weights["w"], (vec![6], vec![0.0; 6]));
}

#[test]
fn what_torch_writes_is_read() {
    let w = (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let buffers = [("mask", "BoolStorage"), ("steps", "LongStorage")];
    let other = |class| format!("holds no floats (torch's {class}); save it with .float()");
    let others = buffers.map(|(name, class)| (name.to_string(), other(class))).into();
    let weights = Tensors::from([("w".to_string(), w)]);
    let losses = [
        ("state_dict", None),
        ("loss_tensor", Some(1.5)),
        ("loss_bf16", Some(1.5)),
        ("loss_numpy", Some(1.5)),
        ("loss_float32", Some(1.25)),
        ("loss_none", None),
        ("beside", Some(1.25)),
        ("wrapped", Some(1.0)),
    ];
    for (name, loss) in losses {
        let saved = parse(Cursor::new(torch(name))).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        assert_eq!((&saved.weights, &saved.others), (&weights, &others), "{name}");
        assert_eq!(Some(saved.loss).filter(|loss| loss.is_finite()), loss, "{name}");
    }
}

#[test]
fn windows_and_other_floats_are_read_as_torch_reads_them() {
    let saved = parse(Cursor::new(torch("views"))).unwrap();
    let w = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
    let cases: [(&str, &[usize], &[f32]); 11] = [
        ("negative", &[2, 3], &w.map(|number| -number)),
        ("negative_slice", &[2], &[-4.0, -5.0]),
        ("transposed", &[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]),
        ("sliced", &[2, 2], &[5.0, 6.0, 9.0, 10.0]),
        ("shared", &[2], &[10.0, 11.0]),
        ("f64", &[2, 3], &w),
        ("f16", &[2, 3], &w),
        ("bf16", &[2, 3], &w),
        ("parameter", &[2, 3], &w),
        ("expanded", &[5, 3], &[0.5; 15]),
        ("repeated", &[2, 2, 3], &[w, w].concat()),
    ];
    assert_eq!(saved.weights.len(), cases.len());
    for (name, shape, values) in cases {
        assert_eq!(saved.weights[name], (shape.to_vec(), values.to_vec()), "{name}");
    }
}

#[test]
fn tensors_of_other_types_do_not_refuse_the_file() {
    let saved = parse(Cursor::new(torch("odd"))).unwrap();
    let others: Vec<_> = saved.others.iter().map(|(name, what)| format!("{name} {what}")).collect();
    let want = [
        "complex holds no floats (torch's ComplexFloatStorage); save it with .float()",
        "csr is sparse; save it with .to_dense()",
        "float8 is of torch's float8_e4m3fn; save it with .float()",
        "int8 holds no floats (torch's CharStorage); save it with .float()",
        "meta has no numbers (device meta); load the model's weights before you save them",
        "nested is nested; save it with .to_padded_tensor(0.0)",
        "quantized is quantized; save it with .dequantize()",
        "sparse is sparse; save it with .to_dense()",
        "uint16 is of torch's uint16; save it with .float()",
    ];
    assert_eq!((others, saved.weights.len()), (want.map(String::from).to_vec(), 1));
}

#[test]
fn a_loss_that_is_no_number_is_named() {
    let with = |loss: &[u8]| {
        let model = b"\x80\x02}(X\x05\0\0\0MODEL}X\x04\0\0\0LOSS".as_slice();
        fault_of_pickle(&[model, loss, b"u."].concat())
    };
    let tensor = |shape: &[u8], strides: &[u8]| {
        [b"ctorch._utils\n_rebuild_tensor_v2\n".as_slice(), &arguments(shape, strides), b"R"].concat()
    };
    let int =
        [b"ctorch._utils\n_rebuild_tensor_v2\n(".as_slice(), &storage("LongStorage", 3), b"K\0))\x89}tR"].concat();
    let cases: [(&[u8], &str); 4] = [
        (b"X\x03\0\0\x001.5", "found the text \"1.5\""),
        (b"\x88", "found the truth value true"),
        (&tensor(b"K\x06", b"K\x01"), "found a tensor of 6 elements"),
        (&int, "found a tensor that holds no floats (torch's LongStorage)"),
    ];
    for (loss, want) in cases {
        let fault = with(loss);
        assert!(fault.starts_with("LOSS: expected a number, ") && fault.contains(want), "{fault}");
        assert!(fault.ends_with("save it as one, with loss.item()"), "{fault}");
    }
}

#[test]
fn numbers_of_numpy_are_read_in_both_orders_of_bytes() {
    let number = |code: &str, big_endian: bool, bytes: &[u8]| NumpyType { code, big_endian }.decode(bytes.to_vec());
    let double = 1.5f64.to_le_bytes();
    let mut reversed = double;
    reversed.reverse();
    let cases: [(&str, bool, &[u8], Option<f64>); 10] = [
        ("f8", false, &double, Some(1.5)),
        ("f8", true, &reversed, Some(1.5)),
        ("f4", false, &1.25f32.to_le_bytes(), Some(1.25)),
        ("f2", false, &[0, 0x3e], Some(1.5)),
        ("i8", false, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Some(-2.0)),
        ("u1", false, &[0xfe], Some(254.0)),
        ("i2", true, &[1, 0], Some(256.0)),
        ("f8", false, &double[1..], None),
        ("f8", false, &[0; 9], None),
        ("U3", false, b"abc", None),
    ];
    for (code, big_endian, bytes, want) in cases {
        assert_eq!(number(code, big_endian, bytes), want, "{code} {bytes:?}");
    }
}

#[test]
fn what_holds_code_is_refused_with_what_to_do() {
    let cases = [
        ("module", "save the tensors alone, with torch.save(model.state_dict(), …)"),
        ("legacy", "save its tensors again, with torch.save(model.state_dict(), …)"),
        ("script", "torch.save(torch.jit.load(FILE).state_dict(), …)"),
        ("list", "found a list; save it with torch.save(model.state_dict(), …)"),
    ];
    for (name, what) in cases {
        let fault = fault_of(torch(name));
        assert!(fault.contains(what), "{name}: {fault}");
    }
}

#[test]
fn metadata_that_is_not_known_is_refused_by_name() {
    let with = |metadata: &[u8]| {
        let arguments = [b"(".as_slice(), &storage("FloatStorage", 6), b"K\0K\x06\x85K\x01\x85\x89}", metadata, b"t"];
        model(&arguments.concat())
    };
    let read = |metadata: &[u8]| parse(Cursor::new(archive(&[("data.pkl", &with(metadata)), ("data/0", &[0; 24])])));
    for metadata in [&b"N"[..], b"}", b"}X\x03\0\0\0neg\x89s", b"}X\x03\0\0\0neg\x88s", b"}X\x04\0\0\0conj\x89s"] {
        assert_eq!(read(metadata).unwrap().weights["w"].0, [6]);
    }
    for metadata in [&b"}X\x04\0\0\0conj\x88s"[..], b"}X\x03\0\0\0neg\x88sX\x04\0\0\0conj\x88s"] {
        let fault = read(metadata).unwrap_err();
        assert!(fault.contains("metadata the text \"conj\": the truth value true, which is not known"), "{fault}");
    }
    assert!(read(b"K\x01").unwrap_err().contains("expected metadata of a tensor, found the number 1"));
}

/// Steps are counted, not timed: values that are fetched again and again cost what the instructions that fetch them do.
#[test]
fn the_cost_of_a_pickle_is_in_proportion_to_its_size() {
    let tensor = [b"(".as_slice(), &storage("FloatStorage", 6), b"K\0K\x06\x85K\x01\x85\x89}"].concat();
    let many = |tail: &[u8]| [&tail.repeat(50_000)[..], b"."].concat();
    let long = b"N".repeat(200_000);
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\nq\0".as_slice();
    let parameter = b"ctorch._utils\n_rebuild_parameter\nq\x01".as_slice();
    let pickles = [
        // Functions of a tuple with a long tail.
        [b"\x80\x02".as_slice(), rebuild, &tensor, &long, b"tq\x02", &many(b"h\0h\x02R")].concat(),
        [b"\x80\x02(", &[rebuild, &tensor, b"tR"].concat()[..], &long, b"tq\0", parameter, &many(b"h\x01h\0R")]
            .concat(),
        // Storages of one.
        [b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NK\x06", &long[..], b"tq\0", &many(b"h\0Q")]
            .concat(),
        // A shape, and metadata, with many entries.
        [
            b"\x80\x02(".as_slice(),
            &long,
            b"tq\x03",
            rebuild,
            b"(",
            &storage("FloatStorage", 6),
            b"K\0h\x03h\x03tq\x02",
            &many(b"h\0h\x02R"),
        ]
        .concat(),
    ];
    for (i, pickle) in pickles.iter().enumerate() {
        match machine::run(pickle) {
            Ok(built) => assert!(built.touched < 4 * pickle.len(), "{i}: {} of {}", built.touched, pickle.len()),
            Err(fault) => assert!(i >= 2, "{i}: {fault}"),
        }
    }
}

#[test]
fn hostile_pickles_are_refused_with_the_reason() {
    let ones = |n: usize| b"K\x01".repeat(n);
    let max = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.".into(), "byte 2: the file asks for \"system\" of \"os\""),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.".into(), "the file asks for \"system\" of \"posix\""),
        (b"\x80\x02cbuiltins\neval\n.".into(), "\"eval\" of \"builtins\""),
        (b"\x80\x02(ios\nsystem\n.".into(), "instruction 0x69 (INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.".into(), "instruction 0x81 (NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.".into(), "cannot be applied to (the number 1)"),
        (b"\x80\x09.".into(), "protocol 9"),
        (b"\x80\x02X\xff\xff\xff\xffMODEL".into(), "4294967295 bytes should follow, found 5"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffMODEL".into(), "18446744073709551615 bytes should follow"),
        (b"\x80\x02h\x07.".into(), "value 7 is fetched, but was never remembered"),
        (b"\x80\x02}(X\x01\0\0\0au.".into(), "a key without a value"),
        (b"\x80\x02u.".into(), "a collection that did not begin"),
        (b"\x80\x02}(q\0.".into(), "takes a value where there is none"),
        (b"\x80\x02\x8a\x09123456789.".into(), "an integer of 9 bytes"),
        (b"\x80\x02X\x01\0\0\0\xff.".into(), "not UTF-8"),
        (b"\x80\x02]a.".into(), "takes a value where there is none"),
        (b"\x80\x02N.".into(), "with MODEL and LOSS, found None"),
        (b"\x80\x02}.".into(), "a dictionary with MODEL and LOSS, found a dictionary with nothing in it"),
        (b"\x80\x02}K\x07Ns.".into(), "found a dictionary with the number 7"),
        (b"\x80\x02".into(), "cut short"),
        (b"(".repeat(1000), "nested deeper than 64"),
        (b"N".repeat((1 << 20) + 1), "more than 1048576 values"),
        // A tuple of the tuple before, many times over: 2^40 elements if they were copied.
        ([b")q\0".as_slice(), &b"h\0h\0\x86q\0".repeat(40), b"."].concat(), "found a tuple"),
        ([b")".as_slice(), &b"\x85".repeat(100_000), b"."].concat(), "found a tuple"),
        (model(&arguments(&[&max[..], max].concat(), b"K\0K\0")), "reaches beyond its storage of 6 elements"),
        (model(&arguments(max, b"K\0")), "its tensors take 36893488147419103228 bytes as f32, expected at most 10737"),
        (model(&arguments(b"J\0\0\0\x10K\x02", b"K\0K\0")), "its tensors take 2147483648 bytes as f32"),
        (model(&arguments(b"K\x02K\x04", &[b"K\x01", &max[..]].concat())), "reaches beyond its storage"),
        (model(&arguments(b"K\x02", b"J\xff\xff\xff\xff")), "expected a size, found -1"),
        (model(&arguments(&ones(65), &ones(65))), "at most 64"),
        (model(b"(K\x01t"), "cannot be applied to (the number 1)"),
        (model(&storage("LongStorage", 3)), "expected a tuple, found a storage"),
        (
            model(&[&b"("[..], &storage("FloatStorage", 7), b"K\0))t"].concat()),
            "w: \"data/0\": found 24 bytes, expected 7 numbers",
        ),
    ];
    for (pickle, reason) in cases {
        let fault = fault_of_pickle(&pickle);
        assert!(fault.contains(reason), "{fault:?} does not say {reason:?}");
    }
}

#[test]
fn what_is_no_checkpoint_is_told_apart() {
    let legacy = [b"\x80\x02\x8a\x0a".as_slice(), &[0x6c; 20]].concat();
    assert!(fault_of(legacy).contains("torch before 1.6"));
    for other in [&b"nonsense"[..], b"", b"PK", b"PK\x03\x04", &[0xff; 100]] {
        assert!(fault_of(other.into()).contains("expected a zip archive"));
    }
    assert!(fault_of(archive(&[("other", b"")])).contains("expected one entry FOLDER/data.pkl, found 0"));
    let missing = fault_of(archive(&[("data.pkl", &model(&arguments(b"K\x06", b"K\x01")))]));
    assert!(missing.contains("\"data/0\""), "{missing}");
}

#[test]
fn a_name_in_both_layouts_is_refused() {
    let both = golden("tt_2d_v040.pth");
    let saved = parse(Cursor::new(both)).unwrap();
    let weights = Tensors::from([
        ("token_embs_rev.0.weight".to_string(), (vec![1], vec![1.0])),
        ("token_embs_rev.0.embedding.weight".to_string(), (vec![1], vec![2.0])),
    ]);
    let mut file = Cursor::new(Vec::new());
    write(&mut file, &weights, saved.loss).unwrap();
    assert!(parse(file).unwrap_err().contains("are the same tensor"));
}

/// Any damage is an error or harmless: no panic, no endless loop, no memory beyond the file's size.
#[test]
fn damaged_files_never_panic() {
    let mut random = 0u64;
    let mut below = move |limit: usize| {
        random += 1;
        (mix(random) % limit as u64) as usize
    };
    for name in ["tt_2d.pth", "tt_2d_v040.pth"] {
        let whole = golden(name);
        let directory = whole.len() - 5000;
        for round in 0..2000 {
            let mut bytes = whole.clone();
            // The pickle, at the start, and the directory, at the end, are what can lead astray.
            for _ in 0..=below(4) {
                let at = match round % 3 {
                    0 => below(5000),
                    1 => directory + below(5000),
                    _ => below(bytes.len()),
                };
                bytes[at] = below(256) as u8;
            }
            if round % 5 == 0 {
                bytes.truncate(below(whole.len()));
            }
            let _ = parse(Cursor::new(bytes));
        }
    }
}

/// The sums of the archive keep damage from the machine and the tensors, so pickles are damaged before they are packed.
#[test]
fn damaged_pickles_never_panic() {
    let mut random = 1u64 << 32;
    let mut below = move |limit: usize| {
        random += 1;
        (mix(random) % limit as u64) as usize
    };
    let mut golden = Archive::open(Cursor::new(golden("tt_2d.pth"))).unwrap();
    let whole = golden.pickle().unwrap();
    let storages: Vec<_> = (0..47).map(|key| golden.entry(&format!("data/{key}"), u64::MAX).unwrap()).collect();
    let names: Vec<_> = (0..47).map(|key| format!("data/{key}")).collect();
    let (mut parsed, mut read) = (0, 0);
    for round in 0..20_000 {
        let mut pickle = whole.clone();
        for _ in 0..=below(3) {
            let at = below(pickle.len());
            pickle[at] = below(256) as u8;
        }
        if round % 5 == 0 {
            pickle.truncate(below(whole.len()));
        }
        if machine::run(&pickle).is_ok() {
            let numbers = names.iter().zip(&storages).map(|(name, bytes)| (name.as_str(), &bytes[..]));
            let entries: Vec<_> = [("data.pkl", &pickle[..])].into_iter().chain(numbers).collect();
            parsed += 1;
            read += usize::from(parse(Cursor::new(archive(&entries))).is_ok());
        }
    }
    assert!(0 < read && read < parsed && parsed < 20_000, "{parsed} were parsed, {read} read");
}
