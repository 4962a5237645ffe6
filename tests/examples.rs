//! Every program in `examples/` runs and prints what it promises.

use std::path::Path;
use std::process::Command;

/// What an example prints. `cargo test` builds them all.
fn output(name: &str) -> String {
    let tests = std::env::current_exe().expect("a test program");
    let program = tests.parent().and_then(Path::parent).expect("the target folder").join("examples").join(name);
    let output = Command::new(&program).output();
    let output =
        output.unwrap_or_else(|error| panic!("{}: {error}; run `cargo test` without --test", program.display()));
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The first number after `before`.
fn number(text: &str, before: &str) -> f64 {
    let rest = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in {text}")).1.trim_start();
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-')).unwrap_or(rest.len());
    rest[..end].parse().unwrap_or_else(|_| panic!("no number after {before:?} in {text}"))
}

#[test]
fn a_model_is_built_in_code() {
    let text = output("build_model");
    assert!(text.contains("logits [4, 125, 257]"), "{text}");
    assert!(number(&text, "step 0:") > 7.5 && number(&text, "at the end:") < 4.0, "{text}");
}

#[test]
fn a_block_of_ones_own_learns() {
    let text = output("custom_block");
    assert!(number(&text, "step   0:") > 7.5 && number(&text, "step 199:") < 3.0, "{text}");
}

#[test]
fn a_data_set_of_ones_own_is_trained_on() {
    let text = output("custom_dataset");
    let bits: f64 = text.split_whitespace().next().unwrap().parse().unwrap();
    assert!(text.contains("bits per byte of a result") && bits < 3.0, "{text}");
}

#[test]
fn texts_of_a_kind_have_hidden_states_alike() {
    let text = output("hidden_states");
    assert!(text.starts_with("hidden states [6, 56, 32]\n"), "{text}");
    assert!(number(&text, "within a kind:") > number(&text, "across:") + 0.2, "{text}");
}

#[test]
fn text_streams_from_one_decoder() {
    let text = output("streaming");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "für alle Fälle: zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.");
    assert!(
        lines[1].starts_with("zwölf Boxkämpfer") && lines[2].starts_with("großen Sylter Deich. für alle"),
        "{text}"
    );
}

#[test]
fn an_encoder_fills_the_gaps() {
    let text = output("masked_encoder");
    assert!(text.contains(" -> the red fox ran over the hill."), "{text}");
    assert!(text.contains(" -> the brown dog ran over the hill."), "{text}");
}

#[test]
fn answers_are_learned_by_a_loss_mask() {
    let text = output("finetune");
    for (land, city) in [("France", "Paris"), ("Egypt", "Cairo"), ("Japan", "Tokyo")] {
        assert!(text.contains(&format!("Q: capital of {land}? A: {city}.\n")), "{text}");
    }
}
