//! Messages of the library and of plugins, and those of panics, as lines on standard error.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::fmt;
use std::io::{self, Write};

use mblm::base::terminal;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The least urgent messages that are shown, `warn` unless it says otherwise.
const VARIABLE: &str = "MBLM_LOG";

/// From now on warnings are shown, and panics in the words of the standard library's own hook.
pub fn start() {
    let wanted = env::var(VARIABLE).unwrap_or_else(|_| "warn".into());
    let level = wanted.parse::<Level>();
    let subscriber = tracing_subscriber::fmt().with_max_level(*level.as_ref().unwrap_or(&Level::WARN));
    let started = subscriber.event_format(Plain).with_writer(|| Lines).try_init();
    debug_assert!(started.is_ok(), "started once");
    if level.is_err() {
        tracing::warn!("{VARIABLE}: expected error, warn, info, debug or trace, found {wanted:?}; warnings are shown");
    }
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = Backtrace::capture();
        let backtrace =
            if backtrace.status() == BacktraceStatus::Captured { format!("\n{backtrace}") } else { "".into() };
        terminal::hush(false);
        terminal::line(format_args!("\nthread '{}' {panic}{backtrace}", thread.name().unwrap_or("<unnamed>")));
    }));
}

/// `warning: the message`, as all lines of the program.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let kind = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "note",
            _ => "debug",
        };
        write!(to, "{kind}: ")?;
        context.field_format().format_fields(to.by_ref(), event)
    }
}

/// Gets each message in one piece.
struct Lines;

impl Write for Lines {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        terminal::line(String::from_utf8_lossy(message));
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
