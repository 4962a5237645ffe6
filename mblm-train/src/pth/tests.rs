//! Files that are whole, damaged, and hostile.

use std::io::{Cursor, Write};
use std::path::PathBuf;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;
use crate::data::order::mix;

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    std::fs::read(path).unwrap()
}

/// An archive with these entries in the folder `x`.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file(format!("x/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
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
    assert_eq!((new.weights.len(), new.loss), (47, 1.25));
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
        (b"\x80\x02}.".into(), "a dictionary with MODEL and LOSS, found another one"),
        (b"\x80\x02".into(), "cut short"),
        (b"(".repeat(1000), "nested deeper than 64"),
        (b"N".repeat((1 << 20) + 1), "more than 1048576 values"),
        // A tuple of the tuple before, many times over: 2^40 elements if they were copied.
        ([b")q\0".as_slice(), &b"h\0h\0\x86q\0".repeat(40), b"."].concat(), "found a tuple"),
        ([b")".as_slice(), &b"\x85".repeat(100_000), b"."].concat(), "found a tuple"),
        (model(&arguments(&[&max[..], max].concat(), b"K\0K\0")), "reaches beyond its storage of 6 elements"),
        (model(&arguments(max, b"K\0")), "more than 4 times its 6 elements"),
        (model(&arguments(b"K\x02K\x04", &[b"K\x01", &max[..]].concat())), "reaches beyond its storage"),
        (model(&arguments(b"K\x02", b"J\xff\xff\xff\xff")), "expected a size, found -1"),
        (model(&arguments(&ones(65), &ones(65))), "at most 64"),
        (model(b"(K\x01t"), "cannot be applied to (the number 1)"),
        (model(&storage("LongStorage", 3)), "a tensor of torch \"LongStorage\""),
        (model(&[&b"("[..], &storage("FloatStorage", 7), b"K\0))t"].concat()), "found 24 bytes, expected 7 numbers"),
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
    assert!(fault_of(b"nonsense".into()).contains("expected a zip archive"));
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
        if Pickle::parse(&pickle).is_ok() {
            let numbers = names.iter().zip(&storages).map(|(name, bytes)| (name.as_str(), &bytes[..]));
            let entries: Vec<_> = [("data.pkl", &pickle[..])].into_iter().chain(numbers).collect();
            parsed += 1;
            read += usize::from(parse(Cursor::new(archive(&entries))).is_ok());
        }
    }
    assert!(0 < read && read < parsed && parsed < 20_000, "{parsed} were parsed, {read} read");
}
