//! Warnings of the library and of plugins, and messages of panics, as lines on standard error.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::{Debug, Write};

use mblm::base::terminal;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Shows errors and warnings; everything else is dropped where it arises.
struct Terminal;

/// From now on warnings are shown, and panics in the words of the standard library's own hook.
pub fn start() {
    let started = tracing::subscriber::set_global_default(Terminal);
    debug_assert!(started.is_ok(), "started once");
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = Backtrace::capture();
        let backtrace =
            if backtrace.status() == BacktraceStatus::Captured { format!("\n{backtrace}") } else { "".into() };
        terminal::line(format_args!("\nthread '{}' {panic}{backtrace}", thread.name().unwrap_or("<unnamed>")));
    }));
}

impl Subscriber for Terminal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        let kind = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        terminal::line(format_args!("{kind}: {}", line.0));
    }

    // Nothing opens spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
