//! Writing what the package's `load_model_state` reads.

use std::io::{Seek, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::Tensors;
use crate::names::{LOSS, MODEL};
use crate::order;

/// Shape and values.
type Tensor = (Vec<usize>, Vec<f32>);

/// The archive's folder.
const FOLDER: &str = "archive";
/// Where storages begin, so that torch can map them.
const ALIGNMENT: u16 = 64;
/// The version of torch's format.
const VERSION: &[u8] = b"3\n";

/// Writes tensors and their validation loss as the package saves them, in its order.
pub fn write(file: impl Write + Seek, weights: &Tensors, loss: f64) -> std::io::Result<()> {
    let mut names: Vec<&String> = weights.keys().collect();
    order::sort(&mut names);
    let tensors: Vec<(&String, &Tensor)> = names.into_iter().map(|name| (name, &weights[name])).collect();
    let mut zip = ZipWriter::new(file);
    let mut add = |name: &str, bytes: &[u8]| {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(bytes.len() > u32::MAX as usize)
            .with_alignment(ALIGNMENT);
        zip.start_file(format!("{FOLDER}/{name}"), options)?;
        zip.write_all(bytes)
    };
    add("data.pkl", &pickle(&tensors, loss))?;
    add("byteorder", b"little")?;
    for (key, (_, (_, values))) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        add(&format!("data/{key}"), &bytes)?;
    }
    add("version", VERSION)?;
    zip.finish()?;
    Ok(())
}

/// `{"MODEL": {name: tensor, …}, "LOSS": loss}` in pickle protocol 2.
fn pickle(tensors: &[(&String, &Tensor)], loss: f64) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    text(&mut out, MODEL);
    out.extend(b"}(");
    for (key, (name, (shape, values))) in tensors.iter().enumerate() {
        text(&mut out, name);
        tensor(&mut out, key, shape, values.len());
    }
    out.push(b'u');
    text(&mut out, LOSS);
    out.push(b'G');
    out.extend(loss.to_be_bytes());
    out.extend(b"u.");
    out
}

/// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, the storage a persistent id.
fn tensor(out: &mut Vec<u8>, key: usize, shape: &[usize], elements: usize) {
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(out, "storage");
    out.extend(b"ctorch\nFloatStorage\n");
    text(out, &key.to_string());
    text(out, "cpu");
    int(out, elements);
    out.extend(b"tQ");
    int(out, 0);
    let strides = (0..shape.len()).map(|dim| shape[dim + 1..].iter().product());
    for sizes in [shape.to_vec(), strides.collect()] {
        out.push(b'(');
        sizes.into_iter().for_each(|size| int(out, size));
        out.push(b't');
    }
    out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn int(out: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(number) => {
            out.push(b'J');
            out.extend(number.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend((number as u64).to_le_bytes());
        }
    }
}
